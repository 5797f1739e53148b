"""What a start costs, and what a step spends on its batch and its log.

  python -m benchmarks.start

CPU seconds, user and system, of commands in processes of their own: training
`tiny` and its dense twin for a step and a batch of validation, and generating
40 tokens with what that saved. "cold" is a start with an empty compilation
cache, "warm" the same command with the cache that it left. Then, of `tiny`,
what a batch takes to be made and a record to be written, beside a step. About
3 minutes on two cores. Writes results/start.json and .png.
"""

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
from matplotlib.figure import Figure

from benchmarks.harness import configs, plots, report, timing, train_steps
from ultramem_jax import data
from ultramem_jax.runs import log as log_lib
from ultramem_jax.train import sharding
from ultramem_jax.train.program import one_device

MODELS = {"UltraMem": "tiny", "dense": "tiny_dense"}
WARM_STARTS = 3  # of each command; the median counts
ROUNDS = 20  # steps, batches and records that are timed


def cpu_seconds(folder: str, *command: str) -> float:
  """Returns the CPU seconds of a command that Python runs.

  Args:
    folder: of its compilation cache.
    command: run in the repository's root.
  Raises:
    RuntimeError: it failed.
  """
  process = subprocess.Popen(
    [sys.executable, *command, f"--compilation_cache={folder}/cache"],
    cwd=report.ROOT,
    stdout=subprocess.DEVNULL,
  )
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise RuntimeError(f"{command[0]} failed: its error stands above")
  return usage.ru_utime + usage.ru_stime


def starts(config: str, folder: str) -> dict[str, float]:
  """Returns the CPU seconds of each kind of start of a model."""

  def train(index: int) -> float:
    return cpu_seconds(
      folder,
      "train.py",
      f"--config=configs/{config}.py",
      f"--workdir={folder}/run_{index}",
      "--config.steps=1",
      "--config.eval_batches=1",
      "--config.sample.num_tokens=0",
    )

  def generate(_: int) -> float:
    return cpu_seconds(
      folder,
      "-m",
      "ultramem_jax",
      "generate",
      f"--workdir={folder}/run_0",
      "--prompt=def ",
      "--num_tokens=40",
    )

  result = {}
  for name, start in {"train": train, "generate": generate}.items():
    result[f"{name}, cold"] = start(0)
    warm = [start(index) for index in range(1, WARM_STARTS + 1)]
    result[f"{name}, warm"] = statistics.median(warm)
  return result


def mean_seconds(function: Callable[[], Any]) -> float:
  """Returns the mean seconds of a function, called once before."""
  function()
  began = time.perf_counter()
  for _ in range(ROUNDS):
    function()
  return (time.perf_counter() - began) / ROUNDS


def parts_of_a_step() -> dict[str, float]:
  """Returns the seconds of `tiny`'s step, and of batch and log per step.

  The batch is made without the thread that makes it ahead in a run.
  """
  config = configs.load("tiny", {"data.prefetch": 0})
  mesh = one_device(config).mesh
  step, _ = train_steps.stepper(config)
  _, metrics = step()
  batches = data.open(config).train(range(config.batch_size))
  with (
    tempfile.TemporaryDirectory() as folder,
    log_lib.RunLog(folder, config, None) as log,
  ):
    steps = itertools.count(1)
    record = lambda: log.record_step(next(steps), jax.device_get(metrics))
    return {
      "step": timing.median_seconds(step, ROUNDS),
      "batch": mean_seconds(lambda: sharding.to_devices(next(batches), mesh)),
      "log": mean_seconds(record) / config.log_every,
    }


def measure() -> report.Result:
  cpu = {}
  for name, config in MODELS.items():
    with tempfile.TemporaryDirectory() as folder:
      cpu[name] = starts(config, folder)
    print(f"{name}: {cpu[name]}", flush=True)
  seconds = parts_of_a_step()
  share = (seconds["batch"] + seconds["log"]) / seconds["step"]
  print(f"seconds: {seconds}; batch and log are {share:.2%} of a step")
  return {"cpu_seconds": cpu, "seconds": seconds}


def plot(result: report.Result) -> Figure:
  """Draws the CPU seconds of each start."""
  cpu = result["cpu_seconds"]
  dense = cpu["dense"]["train, cold"]
  figure, (axes,) = plots.figure(
    "The first start of UltraMem takes "
    f"{cpu['UltraMem']['train, cold'] / dense:.1f} times the CPU time of the "
    f"dense model's, a later one {cpu['UltraMem']['train, warm'] / dense:.1f} "
    "times",
    result,
  )
  plots.bars(
    axes,
    {
      f"{name}: {start}": seconds
      for name, of_starts in cpu.items()
      for start, seconds in of_starts.items()
    },
    text="{:.1f}",
    colors=[plots.MODELS[name] for name in cpu for _ in cpu[name]],
  )
  axes.set(xlabel="CPU seconds of a start")
  return figure


if __name__ == "__main__":
  report.main("start", report.Part(measure, plot))
