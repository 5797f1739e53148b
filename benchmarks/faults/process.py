"""Runs of train.py in forks of this process, which can be disturbed.

This process has imported everything, so that a run begins at once. It touches
no device: a fork of a process with a device would hang.
"""

import atexit
import contextlib
import fcntl
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import train
from ultramem_jax import cli
from ultramem_jax.evaluation import loss
from ultramem_jax.runs.checkpoint import Checkpointer
from ultramem_jax.tools import training
from ultramem_jax.train.program import TrainProgram

# What a run reports as it begins and ends: event -> where it is.
EVENTS = {
  "open": (training, "open_corpus"),
  "compile": (training, "compile_step"),
  "restore": (Checkpointer, "restore_latest"),
  "step": (TrainProgram, "__call__"),
  "validate": (loss, "run"),
  "save": (Checkpointer, "save"),
  "close": (Checkpointer, "close"),
  "sample": (training, "try_sample"),
}
PIPE_BYTES = 2**20
# After which a run counts as one that hangs.
PATIENCE_SECONDS = 900


class Event(NamedTuple):
  """A moment of a run: a key of EVENTS, "begin" or "end", monotonic seconds."""

  name: str
  edge: str
  seconds: float


class Process:
  """A run of train.py.

  Args:
    arguments: of the command.
    prepare: functions that disturb it, called in the fork before the run.
    environment: variables that it has besides those of this process.
    main: what the fork does instead of the run.
  Attributes:
    events: that it has reported so far.
    status: as of `subprocess.Popen`; None: it runs.
    began, ended: monotonic seconds.
    sent: the signals that it was sent, and when.
    hangs: whether it was killed for taking too long.
  """

  def __init__(
    self,
    arguments: Sequence[str] = (),
    prepare: Sequence[Callable[[], None]] = (),
    environment: dict[str, str] | None = None,
    main: Callable[[], None] | None = None,
  ):
    self.events: list[Event] = []
    self.status: int | None = None
    self.sent: list[tuple[int, float]] = []
    self.hangs = False
    self.began = self.ended = time.monotonic()
    self._text = {"told": b"", "output": b"", "errors": b""}
    pipes = {name: os.pipe() for name in self._text}
    sys.stdout.flush()
    self.pid = os.fork()
    if self.pid == 0:
      ends = [pipes[name][1] for name in self._text]
      _run(ends, arguments, prepare, environment or {}, main)
    self._pipes = {}
    for name, (reading, writing) in pipes.items():
      os.close(writing)
      os.set_blocking(reading, False)
      fcntl.fcntl(reading, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
      self._pipes[reading] = name

  @property
  def output(self) -> str:
    return self._text["output"].decode(errors="replace")

  @property
  def errors(self) -> str:
    return self._text["errors"].decode(errors="replace")

  def signal(self, number: int) -> bool:
    """Sends a signal, unless the run has ended; returns whether it did."""
    self.poll(0)
    if self.status is None:
      self.sent.append((number, time.monotonic()))
      os.kill(self.pid, number)
    return self.status is None

  def was_sent(self, number: int) -> bool:
    return any(sent == number for sent, _ in self.sent)

  def moment(self, seconds: float) -> str:
    """Returns what the run was in at a moment: a key of EVENTS, or "between".

    "start" is before the first step, where nothing else is.
    """
    inside = []
    for event in self.events:
      if event.seconds <= seconds:
        if event.edge == "begin":
          inside.append(event.name)
        elif event.name in inside:
          inside.remove(event.name)
    if inside:
      return inside[-1]
    steps = [e.seconds for e in self.events if e.name == "step"]
    return "between" if steps and steps[0] <= seconds else "start"

  def count(self, name: str, edge: str = "begin", since: float = 0) -> int:
    """Returns how often an event was reported since a moment."""
    return sum(
      e.name == name and e.edge == edge and e.seconds > since
      for e in self.events
    )

  def wait_for(self, name: str, times: int = 1) -> bool:
    """Waits until something begins; returns whether it did."""
    until = time.monotonic() + PATIENCE_SECONDS
    while self.count(name) < times and self.status is None:
      self.poll(0.2, until)
    return self.count(name) >= times and self.status is None

  def sleep(self, seconds: float) -> None:
    """Waits, but not beyond the end of the run."""
    until = time.monotonic() + seconds
    while self.status is None and time.monotonic() < until:
      time.sleep(min(0.002, max(0, until - time.monotonic())))
      self.poll(0)

  def finish(self) -> "Process":
    """Waits for the end of the run."""
    until = time.monotonic() + PATIENCE_SECONDS
    while self.status is None:
      self.poll(0.2, until)
    return self

  def poll(self, seconds: float, until: float = float("inf")) -> None:
    """Takes what the run has written, and its status if it has ended.

    Args:
      seconds: to wait for it.
      until: monotonic; a run that has not ended then is killed.
    """
    if self.status is None:
      pid, status = os.waitpid(self.pid, os.WNOHANG)
      if pid:
        self.status, seconds = os.waitstatus_to_exitcode(status), 0
        self.ended = time.monotonic()
    for fd in select.select(list(self._pipes), [], [], seconds)[0]:
      # A pipe may hold more than one read returns.
      while piece := _read(fd):
        self._text[self._pipes[fd]] += piece
    *lines, rest = self._text["told"].split(b"\n")
    self._text["told"] = rest
    for line in lines:
      name, edge, value = line.decode().split()
      self.events.append(Event(name, edge, float(value)))
    if self.status is not None:
      for fd in self._pipes:
        os.close(fd)
      self._pipes = {}
    elif time.monotonic() > until:
      os.kill(self.pid, signal.SIGKILL)
      self.hangs = True


def _read(fd: int) -> bytes:
  try:
    return os.read(fd, PIPE_BYTES)
  except BlockingIOError:
    return b""


def _run(
  pipes: Sequence[int],
  arguments: Sequence[str],
  prepare: Sequence[Callable[[], None]],
  environment: dict[str, str],
  main: Callable[[], None] | None,
) -> None:
  """Runs main, or train.py, in this process, a fork, and exits."""
  told, output, errors = pipes
  os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
  os.dup2(output, 1)
  os.dup2(errors, 2)
  # What this process knows of its own streams is not true of pipes.
  sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
  sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
  for number in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
  # The shell may have turned Ctrl-C off for a background program.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  os.environ.update(environment)
  sys.argv = ["train.py", *arguments]
  status = 0
  try:
    for function in prepare:
      function()
    if main:
      main()
    else:
      for name, (owner, attribute) in EVENTS.items():
        _tell(told, name, owner, attribute)
      train.define_flags()
      cli.run(train.main)
  except SystemExit as end:
    status = end.code if isinstance(end.code, int) else 0
  except BaseException:
    traceback.print_exc()
    status = 1
  # What Python does at an exit, but for taking apart all that was imported.
  with contextlib.suppress(BaseException):
    atexit._run_exitfuncs()
  for stream in (sys.stdout, sys.stderr):
    with contextlib.suppress(OSError):
      stream.flush()
  os._exit(status)


def _tell(pipe: int, name: str, owner: object, attribute: str) -> None:
  """Lets a function write to a pipe when it begins and ends."""
  inner = getattr(owner, attribute)

  def write(edge):
    os.write(pipe, f"{name} {edge} {time.monotonic()}\n".encode())

  def told(*arguments, **named):
    write("begin")
    try:
      return inner(*arguments, **named)
    finally:
      write("end")

  setattr(owner, attribute, told)
