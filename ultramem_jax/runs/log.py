"""The log of a run: its records, its progress on the console, its speed."""

import contextlib
import os
import time
from typing import Any

from ultramem_jax.runs import metrics, progress
from ultramem_jax.runs.step_reader import Restored
from ultramem_jax.settings.config import Config


def describe(step: int, results: dict[str, float]) -> str:
  """Returns a line with the results of a validation."""
  return (
    f"step {step}: validation loss {results['loss']:.4f}, perplexity "
    f"{results['perplexity']:.3f}, {results['bits_per_byte']:.4f} bits per byte"
  )


class RunLog(contextlib.AbstractContextManager):
  """Writes the records of a run and shows them on the console.

  Speed is measured from one record of a step to the next. The time of
  validations and of scheduled checkpoints does not count: `restart_clock` is
  called after them.

  Args:
    workdir: the run's directory.
    config: the run.
    restored: the checkpoint that the run goes on from; None: it is fresh.
    since: the step from which config holds: others decided what was recorded
      before.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    config: Config,
    restored: Restored | None,
    since: int = 0,
  ):
    start = restored.step if restored else 0
    due = bool(restored and restored.validation_due)
    expected = {
      name: [n for n in range(every, end, every) if n > since]
      for name, every, end in (
        ("loss", config.log_every, start + 1),
        ("valid/loss", config.eval_every, start + 1 - due),
      )
    }
    self._tokens = config.batch_size * config.data.seq_len
    self._writer = metrics.Writer(
      workdir, start if restored else None, due, expected
    )
    self._progress = progress.Progress(start, config.steps)
    self.restart_clock(start)
    if restored:
      self.note(f"resuming from the checkpoint of step {start}")

  def __exit__(self, *exception) -> None:
    self._progress.close()
    self._writer.close()

  def restart_clock(self, step: int) -> None:
    """Measures speed from here on, after a number of steps."""
    self._clock = step, time.monotonic()

  def record_step(self, step: int, values: dict[str, Any]) -> None:
    """Records the metrics of a step, and the speed since the clock started."""
    first, began = self._clock
    speed = (step - first) * self._tokens / (time.monotonic() - began)
    self._writer.write(step, values)
    self._writer.write_timing(
      step, {"tokens_per_second": speed, "step_seconds": self._tokens / speed}
    )
    self._progress.update(step, values["loss"], speed)
    self.restart_clock(step)

  def record_validation(self, step: int, results: dict[str, float]) -> None:
    """Records the results of a validation."""
    self._writer.write(step, {f"valid/{k}": v for k, v in results.items()})
    self.note(describe(step, results))

  def note(self, text: str) -> None:
    """Shows a line on the console."""
    self._progress.note(text)

  def sync(self) -> None:
    """Forces all records to the disk; due before a checkpoint is saved."""
    self._writer.sync()
