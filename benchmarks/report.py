"""What the benchmarks share: the machine's name, timing, JSON results."""

import json
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).parent / "results"


def machine() -> dict[str, Any]:
  """The machine and versions that a result was taken with."""
  processor = platform.processor() or platform.machine()
  cpuinfo = pathlib.Path("/proc/cpuinfo")
  if cpuinfo.exists():
    names = [
      line.split(":", 1)[1].strip()
      for line in cpuinfo.read_text().splitlines()
      if line.startswith("model name")
    ]
    processor = names[0] if names else processor
  return {
    "devices": [str(device.device_kind) for device in jax.devices()],
    "processor": processor,
    "cores": os.cpu_count(),
    "python": platform.python_version(),
    "jax": jax.__version__,
  }


def interleaved_seconds(
  functions: dict[str, Callable[[], Any]], rounds: int, warmup: int = 2
) -> dict[str, float]:
  """Median seconds of each function, all called in turn in every round.

  Args:
    functions: by name; each returns arrays to wait for.
    rounds: timed calls of each.
    warmup: calls of each before, not timed.
  """
  seconds = {name: [] for name in functions}
  for round_index in range(warmup + rounds):
    for name, function in functions.items():
      began = time.perf_counter()
      jax.block_until_ready(function())
      if round_index >= warmup:
        seconds[name].append(time.perf_counter() - began)
  return {name: statistics.median(times) for name, times in seconds.items()}


def save(name: str, result: dict[str, Any]) -> pathlib.Path:
  """Writes results/NAME.json, the machine included; returns its path."""
  RESULTS.mkdir(exist_ok=True)
  path = RESULTS / f"{name}.json"
  path.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
  return path
