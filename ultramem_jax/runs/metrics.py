"""A run's logs.

`metrics.jsonl` holds what depends on the run only (losses, rates, norms,
statistics of the memories, validation results), `timing.jsonl` what depends on
the clock and the machine. Both hold lines of JSON, {"step": n, name: value,
...}, and both are copied to TensorBoard.

A run that is killed and continued writes `metrics.jsonl` byte for byte as an
unbroken run does, if its loop keeps to this order at every step s:

  1. write the training record, validate, write the validation's record;
  2. `Writer.sync()`;
  3. save the checkpoint of step s;

and writes nothing to `metrics.jsonl` at a step <= s after that. So whenever a
checkpoint of step s exists, every record of a step <= s is on the disk, and
`Writer(workdir, s)` drops exactly those that will be written again. A run that
was stopped in the validation of step s saves first, and validates when it goes
on.
"""

import math
import os
import pathlib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from absl import logging

from ultramem_jax.runs import files, record_file, tensorboard

METRICS_NAME = "metrics.jsonl"
TIMING_NAME = "timing.jsonl"


def plain(value: Any) -> Any:
  """Returns a JSON value that reads back as exactly the same number.

  A float32 becomes the float64 of the same value. NaN and infinities, which
  JSON lacks, become the strings "NaN", "Infinity" and "-Infinity", which
  Python's float() understands.
  """
  if isinstance(value, dict):
    return {name: plain(part) for name, part in value.items()}
  if isinstance(value, (list, tuple)):
    return [plain(part) for part in value]
  if value is None or isinstance(value, (str, bool, int)):
    return value
  if isinstance(value, float):
    if math.isfinite(value):
      return value
    return "NaN" if math.isnan(value) else f"{'-' * (value < 0)}Infinity"
  array = np.asarray(value)
  if array.dtype.kind not in "biu":
    array = array.astype(np.float64)
  return plain(array.tolist())


class Writer:
  """Appends records to the logs; on processes other than 0 it does nothing.

  A log that cannot be written does not stop a run (`record_file`,
  `tensorboard`).

  Args:
    workdir: the run's directory, which exists: one that was renamed meanwhile
      is not made anew.
    step: step of the checkpoint that the run continues from; None: a fresh
      run. Records of later steps are dropped.
    validation_due: whether the validation of that step is still to be recorded.
    expected: names of values, and the steps up to `step` that have them. Those
      that the logs lack are reported.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    step: int | None,
    validation_due: bool = False,
    expected: Mapping[str, Iterable[int]] = MappingProxyType({}),
  ):
    self._files = {}
    if jax.process_index() != 0:
      return
    workdir = pathlib.Path(workdir)
    kept = []
    for name in (METRICS_NAME, TIMING_NAME):
      kept += record_file.rewind(workdir / name, step, validation_due)
      self._files[name] = record_file.RecordFile(workdir / name)
    files.sync_folder(workdir)
    for name, steps in expected.items():
      known = {record["step"] for record in kept if name in record}
      if lost := [n for n in steps if n not in known]:
        logging.warning(
          "the logs of %s have lost %r of %d steps, %d to %d; the run goes on",
          *(workdir, name, len(lost), lost[0], lost[-1]),
        )
    first = 0 if step is None else step + 1
    self._board = tensorboard.Board(workdir / "tensorboard", first)

  def _write(self, name: str, step: int, values: dict[str, Any]) -> None:
    if not self._files:
      return
    record = {key: plain(value) for key, value in values.items()}
    self._files[name].append({"step": int(step), **record})
    numbers = {
      key: value for key, value in record.items() if type(value) in (int, float)
    }
    self._board.write(int(step), numbers)

  def write(self, step: int, values: dict[str, Any]) -> None:
    """Appends a record to metrics.jsonl.

    Args:
      step: number of optimizer steps done; never decreases.
      values: scalars, strings or arrays by name, which depend on the run only.
    """
    self._write(METRICS_NAME, step, values)

  def write_timing(self, step: int, values: dict[str, Any]) -> None:
    """Appends a record to timing.jsonl; arguments as for `write`."""
    self._write(TIMING_NAME, step, values)

  def sync(self) -> None:
    """Forces all records to the disk; call it before saving a checkpoint."""
    for file in self._files.values():
      file.sync()

  def close(self) -> None:
    """Forces all records to the disk and closes the files."""
    for file in self._files.values():
      file.close()
    if self._files:
      self._board.close()
