"""Runs that are asked to stop by SIGTERM, in each part of a run in turn.

One at a time, so that what passes until all is saved is the run's own.
"""

import pathlib
import random
import shutil
import signal
from typing import Any

from benchmarks.faults.kills import after_signal
from benchmarks.faults.process import Process
from benchmarks.faults.scene import STEPS, Scene
from benchmarks.faults.trial import resumed_at
from benchmarks.harness import page
from ultramem_jax.runs import workdir as workdir_lib

SETTINGS = {
  "sample.num_tokens": 20,
  # Long enough to meet a signal.
  "data.valid_path": "data/train_*.txt",
  "eval_batches": 20,
}
# Parts of a run -> how often each begins at least, where a run starts over.
MOMENTS = {
  "start": 0,
  "compile": 1,
  "restore": 1,
  "step": STEPS // 2,
  "validate": 1,
  "save": 1,
  "sample": 1,
}
TRIES = 9


def ask(folder: pathlib.Path, count: int, seed: int) -> list[dict[str, Any]]:
  """Asks runs to stop; returns and prints what came of each.

  Args:
    folder: for all files.
    count: of runs.
    seed: of what is random.
  """
  scene = Scene(folder, "dense", settings=SETTINGS)
  asked = []
  for index in range(count):
    name = list(MOMENTS)[index % len(MOMENTS)]
    for attempt in range(TRIES):
      rng = random.Random(f"{seed}/{index}/{attempt}")
      process, half = _ask_one(scene, folder / "stop" / "run", name, rng)
      if process.sent and _part(process) == name:
        break
    else:
      print(f"no signal met {name}")
      continue
    asked.append(_judge(process, folder / "stop" / "run", name))
    told = asked[-1]
    print(
      f"{index + 1:3} {name:9} {'half' if half else 'fresh':6}"
      f"{told['steps']} steps, {told['saves']} saves after it; saved after "
      f"{told['seconds']:.3f} s, ended after {told['ended']:.3f} s  "
      f"{told['failure']}",
      flush=True,
    )
  return asked


def _ask_one(
  scene: Scene, workdir: pathlib.Path, name: str, rng: random.Random
) -> tuple[Process, bool]:
  """Runs until a random moment within a part; returns the ended run, and how
  it began."""
  half = name == "restore" or rng.random() < 0.5
  shutil.rmtree(workdir.parent, ignore_errors=True)
  scene.begin(workdir, half)
  cold = workdir.with_name("xla") if name == "compile" else None
  (process,) = scene.start(workdir, cache=cold)
  if times := MOMENTS[name]:
    least = 2 if half and times > 1 else times
    process.wait_for(name, rng.randint(1, least))
  process.sleep(rng.uniform(0, _longest(scene, name)))
  process.signal(signal.SIGTERM)
  return process.finish(), half


def _longest(scene: Scene, name: str) -> float:
  """Returns the seconds that a part of a run may take, about."""
  if name == "sample":  # which half a run has none of
    return scene.seconds["start"] / 2
  return scene.seconds[name]


def _part(process: Process) -> str:
  """Returns the part of a run that a signal met."""
  part = process.moment(process.sent[0][1])
  return "step" if part == "between" else part


def _judge(
  process: Process, workdir: pathlib.Path, name: str
) -> dict[str, Any]:
  steps, saves, seconds = after_signal(process)
  taken = resumed_at(process) + process.count("step")
  saved = max(workdir_lib.saved_steps(workdir / "checkpoints"), default=0)
  failure = ""
  if process.status not in (0, -signal.SIGTERM) or process.hangs:
    failure = f"ended with {process.status}: {process.errors[-1000:]}"
  elif "Traceback" in process.errors:
    failure = process.errors[-1000:]
  elif steps > 1 or saves > 1:
    failure = "waited for more than a step and a save"
  elif process.count("sample", since=process.sent[0][1]):
    failure = "a sample began after it"
  elif saved != taken and process.count("step"):
    failure = f"{taken} steps were taken, {saved} are saved"
  return {
    "moment": name,
    "steps": steps,
    "saves": saves,
    "seconds": seconds,
    "ended": process.ended - process.sent[0][1],
    "failure": failure,
  }


def print_table(asked: list[dict[str, Any]]) -> None:
  """Prints the median and the worst of each part of a run, and of all."""
  rows = []
  names = list(dict.fromkeys(stop["moment"] for stop in asked))
  for name in [*names, "all"]:
    held = [stop for stop in asked if name in ("all", stop["moment"])]
    cells = [
      _of([stop[key] for stop in held])
      for key in ("steps", "saves", "seconds", "ended")
    ]
    rows.append([name, str(len(held)), *cells])
  header = "signal in, tried, steps, saves, s to saved, s to the end"
  print(page.table(header.split(", "), rows))


def _of(numbers: list[float]) -> str:
  middle = sorted(numbers)[len(numbers) // 2]
  return f"{middle:.3g} / {max(numbers):.3g}"
