"""Does a run survive? Faults of many kinds, at random moments.

  python -m benchmarks.faults [--count=300] [--seed=0] [--kinds=kill_save,...]

Each fault disturbs a run of a tiny model: it is killed, stopped, starved, or
its files are damaged. Then the fault is taken away, and the same command goes
on until the run ends. A run survives if parameters, moments, the place in the
data and metrics.jsonl equal those of a run that nothing disturbed, to the bit;
if no more than the steps since its last save were taken again; and if what
ended it was a signal, or one line that names what to mend.

Kinds that need a disk of their own are left out where mounting is not allowed.
A fault takes two starts of the run, about four seconds of a core; Ctrl-C ends
early, with what has been tried. Writes results/faults.json; `--memory` takes a
model with a memory, for three times as long.

  python -m benchmarks.faults --inputs=3000 [--properties=config,...]

tries inputs instead: files and settings that are almost right. Each is accepted
or refused in one line, and nothing is written outside its folder. Writes
results/inputs.json.
"""

import collections
import contextlib
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from absl import app, flags

from benchmarks.faults import damage, disks, kills, others
from benchmarks.faults.digest import Lost
from benchmarks.faults.scene import Scene
from benchmarks.faults.trial import Trial
from benchmarks.harness import report


class Kind(NamedTuple):
  """A kind of fault.

  disturb: does it to a run.
  begins: with how much of the run done: "fresh", "half", or "either".
  count: of processes.
  mounts: whether it needs a disk of its own.
  """

  disturb: Callable[[Trial], None]
  begins: str = "either"
  count: int = 1
  mounts: bool = False


KINDS = {
  "kill_start": Kind(kills.kill("start")),
  "kill_restore": Kind(kills.kill("restore"), "half"),
  "kill_step": Kind(kills.kill("step")),
  "kill_save": Kind(kills.kill("save")),
  "kill_end": Kind(kills.kill("end")),
  "kill_often": Kind(kills.kill_often),
  "sigterm": Kind(kills.stop(kills.ASKING[0])),
  "sigint_sighup": Kind(kills.stop(*kills.ASKING[1:])),
  "signal_early": Kind(kills.stop_early),
  "signals": Kind(kills.storm),
  "pause": Kind(kills.pause),
  "kill_one_of_two": Kind(kills.kill_one, count=2),
  "sigterm_one_of_two": Kind(kills.stop_one, count=2),
  "disk_full": Kind(disks.few_bytes, mounts=True),
  "disk_read_only": Kind(disks.read_only, mounts=True),
  "disk_errors": Kind(disks.errors),
  "disk_slow": Kind(disks.slow),
  "file_limit": Kind(disks.file_limit),
  "few_files": Kind(disks.few_files),
  "console": Kind(disks.console),
  "checkpoint_truncated": Kind(damage.checkpoint(damage.truncate), "half"),
  "checkpoint_flipped": Kind(damage.checkpoint(damage.flip), "half"),
  "checkpoint_removed": Kind(damage.checkpoint(damage.remove), "half"),
  "checkpoint_zeros": Kind(damage.checkpoint(damage.fill), "half"),
  "checkpoint_exchanged": Kind(damage.checkpoint(damage.exchange), "half"),
  "checkpoints_all": Kind(damage.all_checkpoints, "half"),
  "checkpoint_folders": Kind(damage.step_folders, "half"),
  "logs": Kind(damage.logs, "half"),
  "config": Kind(damage.config, "half"),
  "inputs": Kind(damage.inputs, "half"),
  "data": Kind(damage.data, "half"),
  "compiled": Kind(damage.cache),
  "second_run": Kind(others.second),
  "not_a_number": Kind(others.not_a_number),
  "clock": Kind(others.clock),
  "renamed": Kind(others.renamed),
}

COUNT = flags.DEFINE_integer("count", 300, "Faults.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of all that is random.")
CHOSEN = flags.DEFINE_list("kinds", list(KINDS), "Kinds of faults, in turn.")
MEMORY = flags.DEFINE_bool("memory", False, "Whether the model has a memory.")
INPUTS = flags.DEFINE_integer(
  "inputs", 0, "Examples of input to try, instead of faults."
)
PROPERTIES = flags.DEFINE_list("properties", [], "Of these alone; all.")
flags.register_validator(
  "kinds",
  lambda given: set(given) <= set(KINDS),
  f"must be some of {', '.join(KINDS)}",
)


def campaign(folder: pathlib.Path) -> dict[str, Any]:
  """Does faults of all chosen kinds in turn, and prints a line for each.

  Ctrl-C ends it, with what has been done.
  """
  scenes: dict[int, Scene] = {}
  kinds = [
    name
    for name in CHOSEN.value
    if not KINDS[name].mounts or disks.can_mount(folder)
  ]
  faults: list[dict[str, Any]] = []
  # The shell may have turned Ctrl-C off for a background program.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  with contextlib.suppress(KeyboardInterrupt):
    for index in range(COUNT.value):
      name = kinds[index % len(kinds)]
      count = KINDS[name].count
      if count not in scenes:
        place = folder / f"scene_{count}"
        scenes[count] = Scene(place, MEMORY.value, count)
      seed = f"{SEED.value}/{name}/{index}"
      fault = one(name, seed, scenes[count], folder / "run")
      faults.append(fault)
      print(
        f"{index + 1:4} {name:22}{fault['outcome']:10}"
        f"{fault['seconds']:6.1f} s  {fault['told'][:150]}",
        flush=True,
      )
  return {"seed": SEED.value, "memory": MEMORY.value, "faults": faults}


def one(
  name: str, seed: str, scene: Scene, workdir: pathlib.Path
) -> dict[str, Any]:
  """Does one fault; returns what came of it."""
  kind, rng, began = KINDS[name], random.Random(seed), time.monotonic()
  half = rng.random() < {"fresh": 0, "half": 1, "either": 0.5}[kind.begins]
  scene.begin(workdir, half and not kind.mounts)
  trial = Trial(scene, rng, workdir, half)
  outcome, told = "same", ""
  try:
    kind.disturb(trial)
    trial.survive()
  except Lost as error:
    outcome, told = "LOST", str(error)
  finally:
    if kind.mounts:
      subprocess.run(["umount", workdir], check=False)
    for process in trial.processes:
      process.signal(signal.SIGKILL)
  if outcome == "same" and not trial.hit:
    outcome = "missed"
  return {
    "kind": name,
    "seed": seed,
    "outcome": outcome,
    "told": told or trial.told,
    "stopped": trial.stopped,
    "seconds": time.monotonic() - began,
  }


def print_table(result: dict[str, Any]) -> None:
  """Prints a line for each kind, and the slowest stop."""
  by_kind = collections.defaultdict(list)
  for fault in result["faults"]:
    by_kind[fault["kind"]].append(fault)
  print("| fault | tried | survived | of these told in one line | lost |")
  print("|---|---|---|---|---|")
  for name, faults in by_kind.items():
    good = [f for f in faults if f["outcome"] != "LOST"]
    told = sum(bool(f["told"]) for f in good)
    print(
      f"| {name} | {len(faults)} | {len(good)} | {told} "
      f"| {len(faults) - len(good)} |"
    )
  stops = [f["stopped"] for f in result["faults"] if f["stopped"]]
  if stops:
    steps, saves, seconds = map(max, zip(*stops, strict=True))
    print(
      f"{len(stops)} stops: at most {steps} steps and {saves} saves began "
      f"after the signal; {seconds:.2f} s at most until all was saved"
    )


def main(_) -> None:
  jax.config.update("jax_platforms", "cpu")
  if INPUTS.value:
    # The library is none of this package's own needs.
    from benchmarks.faults import inputs

    results = inputs.try_all(INPUTS.value, PROPERTIES.value, SEED.value)
    taken = {"machine": report.machine(), "commit": report.commit()}
    report.write("inputs", {**taken, "properties": results})
    if any(result["failure"] for result in results.values()):
      raise SystemExit(1)
    return
  folder = pathlib.Path(tempfile.mkdtemp(prefix="faults_"))
  try:
    result = campaign(folder)
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  print_table(result)
  # Not before: a fork of a process that has a device would hang.
  taken = {"machine": report.machine(), "commit": report.commit()}
  report.write("faults", {**taken, **result})
  if any(fault["outcome"] == "LOST" for fault in result["faults"]):
    raise SystemExit(1)


if __name__ == "__main__":
  report.define_flags()
  app.run(main)
