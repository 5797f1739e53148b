"""Tests of the console's progress, on a real terminal, too."""

import contextlib
import os
import pty
import sys
import termios

from ultramem_jax.runs import progress as progress_lib
from ultramem_jax.runs.progress import Progress


def test_progress_is_lines_without_a_terminal(capsys):
  progress = Progress(20, 100)
  progress.update(40, 3.14159, 12345.6)
  progress.note("validation loss 3.2")
  progress.close()
  first, second = capsys.readouterr().err.splitlines()
  assert first == "step 40/100: loss 3.1416, 12,346 tokens/s, 00:00 left"
  assert second == "validation loss 3.2"


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
  leader, follower = pty.openpty()
  termios.tcsetwinsize(follower, (24, 120))
  with os.fdopen(follower, "w") as terminal:
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(20, 100)
    progress.update(40, 3.14159, 12345.6)
    progress.note("validation loss 3.2")
    progress.close()
  shown = _read_all(leader)
  assert "40/100" in shown
  assert "loss 3.1416, 12,346 tokens/s" in shown
  assert "validation loss 3.2\r\n" in shown


def _read_all(leader: int) -> str:
  """What was written to a terminal, once its other side is closed.

  The kernel hands it over in pieces, whenever it likes.
  """
  pieces = []
  # At the end Linux raises EIO, other systems return nothing.
  with (
    contextlib.suppress(OSError),
    os.fdopen(leader, "rb", buffering=0) as terminal,
  ):
    while piece := terminal.read(1 << 16):
      pieces.append(piece)
  return b"".join(pieces).decode()


def test_only_process_0_shows_it(monkeypatch, capsys):
  monkeypatch.setattr(progress_lib.jax, "process_index", lambda: 1)
  progress = Progress(0, 10)
  progress.update(1, 0.5, 10.0)
  progress.note("hello")
  progress.close()
  assert capsys.readouterr().err == ""
