"""Traces of some steps of a run, for TensorBoard or Perfetto."""

import contextlib
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

from ultramem_jax.settings.checks import require

FOLDER_NAME = "profile"


def parse(text: str, last_step: int) -> range:
  """Returns the steps that "FIRST:LAST" names; none if it is "".

  Args:
    text: of the flag --profile.
    last_step: of the run.
  Raises:
    ConfigError: no such steps.
  """
  if not text:
    return range(0)
  numbers = re.fullmatch(r"(\d+):(\d+)", text)
  first, last = map(int, numbers.groups()) if numbers else (0, 0)
  require(
    1 <= first <= last <= last_step,
    "--profile",
    text,
    f"must be FIRST:LAST, steps of the run (1 to {last_step}), such as 1:5",
  )
  return range(first, last + 1)


class Profile(contextlib.AbstractContextManager):
  """Traces steps of a run; every process writes what its devices did.

  Args:
    workdir: the run's directory; the traces are in its folder "profile", those
      of each of several processes in a folder of their own.
    steps: to be traced, one after the other.
  """

  def __init__(self, workdir: str | os.PathLike, steps: range):
    self._folder = pathlib.Path(workdir, FOLDER_NAME)
    if jax.process_count() > 1:
      self._folder /= f"process_{jax.process_index()}"
    self._steps = steps
    self._tracing = self._began = False

  def step(self, n: int, take_step: Callable[..., Any], state: Any) -> Any:
    """Returns take_step(state), traced if n is one of the steps.

    Before the first and after the last of them it waits for the devices, so
    that the trace holds these steps and nothing else.
    """
    if n not in self._steps:
      return take_step(state)
    if not self._began:
      jax.block_until_ready(state)
      self._start()
    with jax.profiler.StepTraceAnnotation("train", step_num=n):
      results = take_step(state)
    if n == self._steps[-1]:
      jax.block_until_ready(results)
      self._stop()
    return results

  def _start(self) -> None:
    self._began = True
    with self._telling():
      # JAX would notice only when it stops, and then never trace again.
      self._folder.mkdir(parents=True, exist_ok=True)
      jax.profiler.start_trace(self._folder, create_perfetto_trace=True)
      self._tracing = True

  def _stop(self) -> None:
    if self._tracing:
      with self._telling():
        jax.profiler.stop_trace()
      self._tracing = False

  @contextlib.contextmanager
  def _telling(self) -> Iterator[None]:
    """Tells what went wrong; a run needs no trace."""
    try:
      yield
    except (OSError, RuntimeError) as error:
      logging.warning("--profile: no trace in %s: %s", self._folder, error)

  def __exit__(self, *exception) -> None:
    """Writes the trace of a run that was stopped in the middle of it."""
    self._stop()
    if self._steps and not self._began:
      logging.warning("--profile: the run took none of these steps")
