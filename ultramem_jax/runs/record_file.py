"""A file of records, a line of JSON each, that is appended to."""

import contextlib
import json
import os
import pathlib
from typing import Any

from absl import logging

from ultramem_jax.runs import files


def parse(line: bytes) -> dict[str, Any] | None:
  """Returns the record of a line; None if it is none."""
  try:
    record = json.loads(line)
  except (ValueError, RecursionError):
    return None
  if not isinstance(record, dict) or type(record.get("step")) is not int:
    return None
  # A line can be torn just before its end and still read as JSON.
  return record if line.endswith(b"\n") else None


def rewind(
  path: pathlib.Path, step: int | None, validation_due: bool
) -> list[dict[str, Any]]:
  """Drops the records that a run will write again after resuming at a step.

  Lines that are not records are dropped, too, with a warning unless a kill may
  have torn them.

  Args:
    path: of the file, which may be absent.
    step: of the checkpoint; None: everything is dropped.
    validation_due: whether the validation record of that step is dropped, too.
  Returns:
    The records that are kept.
  """
  if not path.exists():
    return []
  kept, strange = {}, 0
  lines = path.read_bytes().splitlines(keepends=True)
  for number, line in enumerate(lines):
    record = parse(line)
    if record is None:
      strange += line.endswith(b"\n")
    elif step is not None and record["step"] <= step:
      is_due = validation_due and record["step"] == step
      if not (is_due and any(name.startswith("valid/") for name in record)):
        kept[number] = record
  if strange:
    logging.warning("%s: dropped %d lines that are not records", path, strange)
  files.write_atomically(path, b"".join(lines[n] for n in kept))
  return list(kept.values())


class RecordFile:
  """Appends lines; a run goes on if they cannot be written.

  They are kept then, and written as soon as there is room again. A line is with
  the operating system when `append` returns, so it outlives the process; `sync`
  makes it outlive the machine.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    self._file = os.open(path, flags, 0o666)
    self._size = os.fstat(self._file).st_size  # of whole lines
    self._waiting, self._told = b"", False

  def append(self, record: dict[str, Any]) -> None:
    """Appends a record, which JSON can represent."""
    line = json.dumps(record, allow_nan=False) + "\n"
    self._waiting += line.encode()
    self._try(self._write)

  def sync(self) -> None:
    """Forces all records to the disk."""
    self._try(self._write)
    self._try(lambda: os.fsync(self._file))

  def close(self) -> None:
    """Forces all records to the disk and closes the file."""
    self.sync()
    if self._waiting:
      lost = self._waiting.count(b"\n")
      logging.warning("%s: %d records are lost", self._path, lost)
    os.close(self._file)

  def _write(self) -> None:
    written = 0
    try:
      while written < len(self._waiting):
        written += os.write(self._file, self._waiting[written:])
    except OSError:
      with contextlib.suppress(OSError):
        os.ftruncate(self._file, self._size)
      raise
    self._size += written
    self._waiting = b""

  def _try(self, action: Any) -> None:
    try:
      action()
    except OSError as error:
      if not self._told:
        logging.warning("%s cannot be written now: %s", self._path, error)
      self._told = True
