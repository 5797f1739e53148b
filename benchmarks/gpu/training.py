"""Tokens a second of models, as train.py reports them."""

import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.harness import runs
from benchmarks.inference import decoding

MODELS = ("UltraMem", "dense", "MoE")  # in order of worth
SPEEDS = 6  # records of a run; the first is not counted


def measure_training(tiny: bool, seconds: float) -> Iterator[dict[str, Any]]:
  """Yields the tokens a second of each model, once training is under way."""
  batch_size = 4 if tiny else 8  # MoE: 65 GB at 16, as XLA counts
  overrides = {
    "data.source": "stdlib",
    "data.tokenizer": "bytes",
    "log_every": 2,
    "batch_size": batch_size,
  }
  end = time.monotonic() + seconds
  for model in MODELS:
    name = decoding.SIZES["tiny" if tiny else "151m"][model]
    with tempfile.TemporaryDirectory() as workdir:
      process = runs.start(name, workdir, overrides)
      try:
        speeds = _first_speeds(workdir, process, end)
      finally:
        process.kill()  # before it saves a checkpoint
        process.wait()
    record = {
      "model": model,
      "config": name,
      "batch_size": batch_size,
      "tokens_per_second": statistics.median(speeds[1:]),
    }
    print(record, flush=True)
    yield record


def _first_speeds(
  workdir: str, process: subprocess.Popen, end: float
) -> list[float]:
  """Waits for the first speeds in the log of a run that is under way."""
  while time.monotonic() < end and process.poll() is None:
    time.sleep(0.2)
    records = runs.records(workdir, "timing")
    if len(records) >= SPEEDS:
      return [record["tokens_per_second"] for record in records]
  raise RuntimeError(f"{workdir} has not come to {SPEEDS} records")
