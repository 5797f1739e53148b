"""Stops a run on request: a batch system's SIGTERM, a user's Ctrl-C, SIGHUP."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any, Self

import jax
from jax.experimental import multihost_utils

from ultramem_jax.runs import console

INTERRUPTED_STATUS = 130  # what a shell reports of a program that Ctrl-C ended
INTERRUPT_SECONDS = 1  # for Python to raise KeyboardInterrupt


def end_on_interrupt() -> None:
  """Lets Ctrl-C end the process even where Python cannot raise it.

  While a program is compiled, Python does not run for minutes. Nothing is lost
  then: whoever has something to save catches the signal.
  """
  reader, writer = os.pipe()
  os.set_blocking(writer, False)
  signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

  def watch():
    while number := os.read(reader, 1):
      handler = signal.getsignal(signal.SIGINT)
      if number[0] == signal.SIGINT and handler == signal.default_int_handler:
        time.sleep(INTERRUPT_SECONDS)
        console.show_at_once("SIGINT: stopped")
        os._exit(INTERRUPTED_STATUS)

  threading.Thread(target=watch, daemon=True).start()


class Stopped(BaseException):
  """Something was left undone, because the run is to stop.

  No Exception, so that nobody takes it for a failure.
  """


class Preemption(contextlib.AbstractContextManager):
  """Turns the first SIGTERM, SIGINT or SIGHUP into a request to stop.

  The loop calls `requested` after every step; on True it saves, waits and
  returns. What may take longer than a step is done in `interruptible`. A second
  SIGTERM or SIGINT kills the process. SIGHUP, which a terminal that closes may
  send several times, asks and never kills.

  With several processes, JAX's preemption service catches SIGTERM and lets all
  of them stop at one step; SIGHUP is passed on to it.
  """

  def __init__(self):
    self._requested = self._interruptible = False
    self._previous = {}
    self._alone = jax.process_count() == 1
    self._polls = 0

  def __enter__(self) -> Self:
    # Under nohup a run has nothing to do with its terminal.
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
      self._handle(signal.SIGHUP, self._catch if self._alone else _pass_on)
    if self._alone:
      self._handle(signal.SIGTERM, self._catch)
      self._handle(signal.SIGINT, self._catch)
    return self

  def __exit__(self, kind, *exception) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    if not self._alone and kind is None:
      # Nobody asks JAX's service any more, which would swallow it. After an
      # error somebody may, as the run may go back to a checkpoint.
      signal.signal(signal.SIGTERM, signal.SIG_DFL)

  def _handle(self, number: int, handler: Any) -> None:
    self._previous[number] = signal.signal(number, handler)

  def _catch(self, number: int, frame: Any) -> None:
    del frame
    self._requested = True
    kills = ""
    if number != signal.SIGHUP:
      for caught in (signal.SIGTERM, signal.SIGINT):
        signal.signal(caught, signal.SIG_DFL)
      kills = "; once more kills"
    name = signal.Signals(number).name
    # Not print, which the signal may have interrupted.
    console.show_at_once(f"{name}: saving and stopping{kills}")
    if self._interruptible:
      raise Stopped

  def requested(self) -> bool:
    """Returns whether to stop; every process calls it at the same places."""
    if not self._alone and not self._requested:
      self._polls += 1
      self._requested = multihost_utils.reached_preemption_sync_point(
        self._polls
      )
    return self._requested

  @contextlib.contextmanager
  def interruptible(self) -> Iterator[None]:
    """Lets a request to stop raise Stopped, wherever the body is.

    For work that may be abandoned half-way. A request to one of
    several processes raises nothing: they have to stop together, where all of
    them call `requested`.
    """
    try:
      self._interruptible = self._alone
      if self._alone and self._requested:
        raise Stopped
      yield
    finally:
      self._interruptible = False

  def check(self) -> None:
    """Raises Stopped if the run is to stop; called as `requested` is."""
    if self.requested():
      raise Stopped


def _pass_on(number: int, frame: Any) -> None:
  """Makes a signal a SIGTERM."""
  del number, frame
  os.kill(os.getpid(), signal.SIGTERM)
