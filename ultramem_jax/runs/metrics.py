"""A run's logs and its progress on the console.

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
`Writer(workdir, s)` drops exactly those that will be written again.
"""

import contextlib
import json
import math
import os
import pathlib
import sys
import time
from typing import Any

import jax
import numpy as np
import tqdm

from ultramem_jax.runs import workdir as workdir_lib

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


def _drop_after(path: pathlib.Path, step: int | None) -> None:
  """Drops torn lines and the records after a step (all, if it is None)."""
  if not path.exists():
    return
  kept = []
  for line in path.read_bytes().splitlines(keepends=True):
    try:
      record = json.loads(line)
    except ValueError:  # the last line of a killed process
      continue
    # A line can be torn just before its end and still read as JSON.
    if step is not None and record["step"] <= step and line.endswith(b"\n"):
      kept.append(line)
  workdir_lib.write_atomically(path, b"".join(kept))


class Writer:
  """Appends records to the logs; on processes other than 0 it does nothing.

  A record is with the operating system when `write` returns, so it outlives
  the process; `sync` makes it outlive the machine.

  Args:
    workdir: the run's directory.
    step: step of the checkpoint that the run continues from; None: a fresh
      run. Records of later steps are dropped.
  """

  def __init__(self, workdir: str | os.PathLike, step: int | None):
    self._files = {}
    self._stack = contextlib.ExitStack()
    if jax.process_index() != 0:
      return
    workdir = pathlib.Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    for name in (METRICS_NAME, TIMING_NAME):
      _drop_after(workdir / name, step)
      file = open(workdir / name, "ab")  # noqa: SIM115 (closed by close)
      self._files[name] = self._stack.enter_context(file)
    # Imported here because it imports torch, if installed, which takes seconds.
    import tensorboardX

    first = 0 if step is None else step + 1
    # TensorBoard hides records of steps >= purge_step in earlier files. The
    # suffix keeps two starts within a second from writing to one file.
    self._board = self._stack.enter_context(
      tensorboardX.SummaryWriter(
        str(workdir / "tensorboard"),
        purge_step=first,
        flush_secs=10,
        filename_suffix=f".{time.monotonic_ns()}",
      )
    )

  def _write(self, name: str, step: int, values: dict[str, Any]) -> None:
    if not self._files:
      return
    record = {"step": int(step)}
    record |= {key: plain(value) for key, value in values.items()}
    line = json.dumps(record, allow_nan=False) + "\n"
    self._files[name].write(line.encode())
    self._files[name].flush()
    for key, value in record.items():
      if key != "step" and type(value) in (int, float):
        self._board.add_scalar(key, value, record["step"])

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
      os.fsync(file.fileno())

  def close(self) -> None:
    """Forces all records to the disk and closes the files."""
    self.sync()
    self._stack.close()


class Progress:
  """Shows how far a run is: a bar on a terminal, elsewhere a line per update.

  Args:
    start: the step the run starts from.
    total: steps of the whole run.
  """

  def __init__(self, start: int, total: int):
    self._start, self._total = start, total
    self._began = time.monotonic()
    self._shown = jax.process_index() == 0
    self._bar = None
    if self._shown and sys.stderr.isatty():
      self._bar = tqdm.tqdm(
        initial=start,
        total=total,
        unit="step",
        file=sys.stderr,
        dynamic_ncols=True,
      )

  def update(self, step: int, loss: float, tokens_per_second: float) -> None:
    """Shows a step, its loss, the speed and the time left."""
    state = f"loss {loss:.4f}, {tokens_per_second:,.0f} tokens/s"
    if self._bar is not None:
      self._bar.set_postfix_str(state, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    done = max(step - self._start, 1)
    left = (self._total - step) * (time.monotonic() - self._began) / done
    self.note(
      f"step {step}/{self._total}: {state}, "
      f"{tqdm.tqdm.format_interval(left)} left"
    )

  def note(self, text: str) -> None:
    """Shows a line, above the bar if there is one."""
    if self._bar is not None:
      self._bar.write(text, file=sys.stderr)
    elif self._shown:
      print(text, file=sys.stderr, flush=True)

  def close(self) -> None:
    """Ends the bar."""
    if self._bar is not None:
      self._bar.close()
