"""Stops a run on request: the batch system's SIGTERM, the user's Ctrl-C."""

import contextlib
import os
import signal
from typing import Any, Self

import jax
from jax.experimental import multihost_utils


class Preemption(contextlib.AbstractContextManager):
  """Turns the first SIGTERM or SIGINT into a request to stop.

  The loop calls `requested` after every step; on True it saves, waits and
  returns. A second signal kills the process. With several processes, JAX's
  preemption service catches SIGTERM and lets all of them stop at one step.
  """

  def __init__(self):
    self._requested = False
    self._previous = {}

  def __enter__(self) -> Self:
    if jax.process_count() == 1:
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._catch)
    return self

  def __exit__(self, *exception) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def _catch(self, number: int, frame: Any) -> None:
    del frame
    self._requested = True
    for caught in self._previous:
      signal.signal(caught, signal.SIG_DFL)
    # Not print, which the signal may have interrupted.
    os.write(
      2,
      f"{signal.Signals(number).name}: saving and stopping; "
      "once more kills\n".encode(),
    )

  def requested(self, step: int) -> bool:
    """Whether to stop after this step; every process calls it every step."""
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._requested
