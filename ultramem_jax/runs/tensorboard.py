"""Numbers of a run for TensorBoard."""

import pathlib
import time
from typing import Any

from absl import logging

FLUSH_SECONDS = 10


class Board:
  """Writes TensorBoard's event file, in the thread of the caller.

  A writer with a thread and a queue, such as tensorboardX's, stands still once
  its thread has failed. If the file cannot be written, that is reported, and
  the run does without.

  Args:
    folder: made if absent.
    first: TensorBoard hides what earlier files have of this step and later.
  """

  def __init__(self, folder: pathlib.Path, first: int):
    # Imported here because it imports torch, if installed, which takes seconds.
    from tensorboardX import event_file_writer
    from tensorboardX.proto import event_pb2
    from tensorboardX.summary import scalar

    proto: Any = event_pb2
    self._event, self._scalar = proto.Event, scalar
    self._file: Any = None
    self._flushed = time.monotonic()
    start = proto.SessionLog(status=proto.SessionLog.START)
    try:
      folder.mkdir(exist_ok=True)
      # The suffix keeps two starts within a second from writing to one file.
      self._file = event_file_writer.EventsWriter(
        str(folder / "events"), f".{time.monotonic_ns()}"
      )
      self._add(first, session_log=start)
    except OSError as error:
      self._give_up(error)

  def write(self, step: int, values: dict[str, float]) -> None:
    """Adds numbers by name."""
    if self._file is None:
      return
    try:
      for name, value in values.items():
        self._add(step, summary=self._scalar(name, value))
      if time.monotonic() > self._flushed + FLUSH_SECONDS:
        self._file.flush()
        self._flushed = time.monotonic()
    except OSError as error:
      self._give_up(error)

  def close(self) -> None:
    """Writes what is left."""
    if self._file is not None:
      try:
        self._file.close()
      except OSError as error:
        self._give_up(error)

  def _add(self, step: int, **content) -> None:
    event = self._event(step=step, wall_time=time.time(), **content)
    self._file.write_event(event)

  def _give_up(self, error: OSError) -> None:
    logging.warning("nothing more is written for TensorBoard: %s", error)
    self._file = None
