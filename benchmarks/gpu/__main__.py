"""Everything that wants an accelerator, by one command of under ten minutes.

  python -m benchmarks.gpu [--tiny]

  machine    what it ran on
  layer      the UltraMem layer against the CPU of the same machine, value and
             gradients, in full float32 precision
  lookup     sums of rows, and the gradient of their scores, by XLA and by the
             kernel (ultramem_jax/ops/kernels/gpu.py): bytes of rows a second,
             as a share of those of a copy, and how far the two forms are apart
  models     figures 1b and 7 of the paper at the 1.6B sizes, and
  growth     figure 6c (`python -m benchmarks.inference`)
  training   tokens a second of the 151M models, dense, MoE and UltraMem

Each part is a process of its own with its number of seconds, and what the parts
before it left over: one that fails, hangs or runs out of memory takes no other
with it, and keeps what it has measured. Writes results/gpu.json after every
measurement, and plots of its parts to results/gpu_PART.png. Compiled programs
are kept in the directory for temporary files: where compiling took the time, a
second run measures what the first left out. --tiny runs all of it in small, on
any machine.
"""

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

from absl import app, flags

from benchmarks.gpu import layer, lookup, training
from benchmarks.harness import report, timing
from benchmarks.inference import compare, plots
from ultramem_jax.runs import compilation_cache

# Of each part; ten minutes, less the start of Python and the plots.
SECONDS = {
  "machine": 30,
  "layer": 40,
  "lookup": 90,
  "models": 190,
  "growth": 75,
  "training": 160,
}
# A part begins nothing new in the last of its seconds: a step of the 1.6B
# models may take that long to compile.
SPARE_SECONDS = 25
# The 1.6B models take more of a GPU than the three quarters that JAX takes.
ENVIRONMENT = {
  "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
  # Where nobody else can leave programs.
  "JAX_COMPILATION_CACHE_DIR": str(
    compilation_cache.default_folder().with_name("benchmarks_gpu")
  ),
}

TINY = flags.DEFINE_bool(
  "tiny", False, "Measure small sizes, to try the script out."
)
PART = flags.DEFINE_enum(
  "part", None, list(SECONDS), "Run this part in this process."
)
LIMIT = flags.DEFINE_float("seconds", None, "Time that --part may take.")


def make_setting(tiny: bool, seconds: float) -> compare.Setting:
  """Returns what the parts `models` and `growth` measure."""
  if tiny:
    return compare.Setting(
      "tiny",
      "float32",
      0,
      (4, 1),
      2**22,
      sides=(32, 64),
      rounds=3,
      seconds=seconds,
    )
  # Batches in order of worth. 1789 is the published table, of 3.2 million rows
  # in each of six memories.
  return compare.Setting(
    "1b6",
    "bfloat16",
    0,
    (64, 1, 512, 16, 256, 4, 128),
    15 * 2**30,
    sides=(1789, 250, 1000, 500),
    seconds=seconds,
  )


def measure(
  part: str, tiny: bool, seconds: float
) -> dict[str, Any] | Iterator[dict[str, Any]]:
  """Returns what a part finds, or an iterator of it."""
  setting = make_setting(tiny, seconds)
  return {
    "machine": lambda: {
      **report.machine(),
      "copy_bytes_per_second": timing.copy_bytes_per_second(),
    },
    "layer": layer.check_layer,
    "lookup": lambda: lookup.measure_lookup(tiny),
    "models": lambda: compare.compare_models(setting),
    "growth": lambda: compare.compare_growth(setting),
    "training": lambda: training.measure_training(tiny, seconds),
  }[part]()


def result_name(tiny: bool) -> str:
  """Returns the name of the result's files."""
  return "gpu_tiny" if tiny else "gpu"


def add(name: str, part: str, value: Any) -> None:
  """Writes a part into the result."""
  report.write(name, {**report.read(name), part: value})


def run_part(part: str, tiny: bool, seconds: float) -> None:
  """Measures in this process, saving after each record."""
  name, found = result_name(tiny), measure(part, tiny, seconds)
  if isinstance(found, dict):
    add(name, part, found)
    return
  records = []
  for record in found:
    records.append(record)
    add(name, part, records)


def run_apart(part: str, tiny: bool, limit: float) -> str | None:
  """Runs a part in a process of its own; returns what went wrong, if so."""
  process = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "benchmarks.gpu",
      f"--part={part}",
      f"--tiny={tiny}",
      f"--seconds={max(1.0, limit - SPARE_SECONDS)}",
      f"--results={report.path('').parent.absolute()}",
    ],
    cwd=report.ROOT,
    start_new_session=True,
    env={**ENVIRONMENT, **os.environ},
  )
  try:
    status = process.wait(limit)
    return f"exit status {status}" if status else None
  except subprocess.TimeoutExpired:
    return f"stopped after {limit:.0f} s"
  finally:
    with contextlib.suppress(ProcessLookupError):  # train.py as well
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_all(tiny: bool) -> dict[str, str]:
  """Runs all parts; returns what went wrong in those that failed."""
  name = result_name(tiny)
  report.write(name, {})
  failed, left_over = {}, 0.0
  for part, seconds in SECONDS.items():
    began = time.monotonic()
    problem = run_apart(part, tiny, seconds + left_over)
    took = time.monotonic() - began
    left_over += seconds - took
    if problem:
      failed[part] = problem
    print(f"{part}: {took:.0f} s, {problem or 'done'}", flush=True)
  ratios = compare.ratios(report.read(name).get("models", []))
  for label, by_batch in ratios.items():
    print(label, {b: round(ratio, 2) for b, ratio in by_batch.items()})
  add(name, "ratios", ratios)
  add(name, "failed", failed)
  return failed


def draw(tiny: bool) -> None:
  """Draws the parts that measured something."""
  name = result_name(tiny)
  result = {**dataclasses.asdict(make_setting(tiny, 0.0)), **report.read(name)}
  result["bandwidth"] = result["machine"]["copy_bytes_per_second"]
  for part, plot in (
    ("models", plots.plot_models),
    ("growth", plots.plot_growth),
    ("lookup", lookup.plot_lookup),
  ):
    if result.get(part):
      plot(result).savefig(report.path(f"{name}_{part}", "png"), dpi=150)


def main(_: list[str]) -> None:
  tiny, failed = TINY.value, {}
  if PART.value:
    run_part(PART.value, tiny, LIMIT.value or SECONDS[PART.value])
    return
  if not flags.FLAGS.plot_only:
    failed = run_all(tiny)
  draw(tiny)
  if failed:
    raise SystemExit(f"failed: {failed}")


if __name__ == "__main__":
  report.define_flags()
  app.run(main)
