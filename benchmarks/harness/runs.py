"""Training runs: train.py in a process of its own, and the logs it leaves."""

import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from benchmarks.harness import report


def start(
  config: str, workdir: str | os.PathLike, overrides: Mapping[str, Any]
) -> subprocess.Popen:
  """Starts training; a run that the workdir holds goes on.

  Args:
    config: the NAME of configs/NAME.py.
    workdir: of the run.
    overrides: of the config's fields, such as {"optim.eps": 1e-6}.
  """
  return subprocess.Popen(
    [
      sys.executable,
      "train.py",
      f"--config=configs/{config}.py",
      f"--workdir={os.path.abspath(workdir)}",
      *(f"--config.{name}={value}" for name, value in overrides.items()),
    ],
    cwd=report.ROOT,
    stdout=subprocess.DEVNULL,
  )


def train(
  config: str, workdir: str | os.PathLike, overrides: Mapping[str, Any]
) -> int:
  """Trains to the last step; returns the most bytes that the process held.

  Args: as for `start`.
  Raises:
    RuntimeError: training failed.
  """
  process = start(config, workdir, overrides)
  _, status, usage = os.wait4(process.pid, 0)
  process.returncode = os.waitstatus_to_exitcode(status)
  if process.returncode:
    raise RuntimeError("train.py failed: its error stands above")
  return 1024 * usage.ru_maxrss  # Linux counts in KiB


def evaluate(workdir: str | os.PathLike) -> dict[str, float]:
  """Returns what eval.py prints of a run: of the whole validation split.

  Raises:
    subprocess.CalledProcessError: it failed.
  """
  printed = subprocess.run(
    [sys.executable, "eval.py", f"--workdir={os.path.abspath(workdir)}"],
    cwd=report.ROOT,
    check=True,
    text=True,
    stdout=subprocess.PIPE,
  )
  return json.loads(printed.stdout)


def records(
  workdir: str | os.PathLike, log: str = "metrics"
) -> list[dict[str, float]]:
  """Returns what a run has logged so far; [] if it has not begun.

  Args:
    workdir: of the run, which may still write.
    log: "metrics", or "timing".
  """
  path = pathlib.Path(workdir, f"{log}.jsonl")
  whole_lines = path.read_text().split("\n")[:-1] if path.exists() else []
  return [json.loads(line) for line in whole_lines]


def curve(workdir: str | os.PathLike, name: str) -> dict[int, float]:
  """Returns a logged number of a run, such as "valid/loss", by step."""
  return {int(r["step"]): r[name] for r in records(workdir) if name in r}
