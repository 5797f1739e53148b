"""Standard output and error that work with any console, or with none."""

import contextlib
import io
import os
import select
import sys

from absl import logging

# What a console that has room takes without letting the writer wait.
PIECE_BYTES = 256
# How long a console may stand still, as a terminal does that shows a selection.
PATIENCE_SECONDS = 5


def complete() -> None:
  """Replaces output streams that are closed, and lets them show any text.

  A file that is opened later would otherwise be written to by whoever writes
  to the closed stream. Characters that the console does not know are escaped.
  """
  while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
  os.close(fd)
  for fd, name in ((1, "stdout"), (2, "stderr")):
    if getattr(sys, name) is None:
      stream = open(fd, "w", closefd=False)  # noqa: SIM115 (until the end)
      setattr(sys, name, stream)
    getattr(sys, name).reconfigure(errors="backslashreplace")


def outlive() -> None:
  """Lets the program go on without its console.

  What a terminal that is gone, a full disk or a closed pipe does not take is
  dropped, from now on and without an error. So is what a console that stands
  still does not take in time.
  """
  for fd, name in ((1, "stdout"), (2, "stderr")):
    stream = getattr(sys, name)
    with contextlib.suppress(OSError):
      stream.flush()
    outliving = io.TextIOWrapper(
      io.BufferedWriter(_Dropping(fd, PATIENCE_SECONDS)),
      encoding=stream.encoding,
      errors="backslashreplace",
      line_buffering=True,
    )
    setattr(sys, name, outliving)
  logging.get_absl_handler().python_handler.setStream(sys.stderr)


def show_at_once(text: str) -> None:
  """Shows a line, or drops it if the console has no room for it now.

  A signal's handler, or a thread, may do so, whatever it interrupts.
  """
  _Dropping(2, patience=0).write(f"{text}\n".encode())


class _Dropping(io.RawIOBase):
  """Writes what a file descriptor takes, and drops the rest."""

  def __init__(self, fd: int, patience: float):
    self._fd = fd
    self._patience = self._usual_patience = patience
    self._room = select.poll()
    self._room.register(fd, select.POLLOUT)

  def fileno(self) -> int:
    return self._fd

  def isatty(self) -> bool:
    return os.isatty(self._fd)

  def writable(self) -> bool:
    return True

  def write(self, data) -> int:
    data = memoryview(data)
    for start in range(0, len(data), PIECE_BYTES):
      if not self._room.poll(1000 * self._patience):
        self._patience = 0  # a console that stands still costs time once
        break
      self._patience = self._usual_patience
      try:
        os.write(self._fd, data[start : start + PIECE_BYTES])
      except OSError:
        break
    return len(data)
