"""Faults of all kinds in turn, some at once; and what came of them.

What has been done is kept in results/faults.partial.jsonl, so that a campaign
that was ended goes on.
"""

import collections
import json
import os
import pathlib
import random
import shutil
import signal
import statistics
import time
from typing import Any

from benchmarks.faults import disks
from benchmarks.faults.digest import Lost
from benchmarks.faults.kinds import KINDS
from benchmarks.faults.process import Process
from benchmarks.faults.scene import Scene
from benchmarks.faults.trial import Trial
from benchmarks.harness import page

# How often a fault is tried that does not come about, such as a kill after the
# end of what it was to interrupt.
TRIES = 5

Fault = dict[str, Any]


class Campaign:
  """Faults of all chosen kinds in turn.

  Args:
    folder: for all files; nothing is in it.
    record: file of the faults that have been done, a JSON line each.
    kinds: keys of KINDS.
    models: keys of `scene.MODELS`; each is for a round of kinds.
    seed: of all that is random.
    commit: of the program; faults of another are not taken from the record.
  Attributes:
    faults: done so far, by index.
  """

  def __init__(
    self,
    folder: pathlib.Path,
    record: pathlib.Path,
    kinds: list[str],
    models: list[str],
    seed: int,
    commit: str,
  ):
    self._folder, self._record, self._seed = folder, record, seed
    mounts = disks.can_mount(folder)
    self._kinds = [k for k in kinds if mounts or not KINDS[k].mounts]
    self._models = models
    self._scenes: dict[tuple[str, int], Scene] = {}
    self.faults: dict[int, Fault] = {}
    head = {"commit": commit, "seed": seed, "kinds": kinds, "models": models}
    held = _read(record)
    if held[:1] == [head]:
      self.faults = {fault["index"]: fault for fault in held[1:]}
    else:
      record.parent.mkdir(parents=True, exist_ok=True)
      record.write_text(json.dumps(head) + "\n")

  def run(self, count: int, at_once: int) -> None:
    """Does the faults up to a count that have not been done.

    Args:
      count: of faults.
      at_once: how many run beside each other.
    Raises:
      KeyboardInterrupt: Ctrl-C or SIGTERM; what was done is kept.
    """
    left = [index for index in range(count) if index not in self.faults]
    for index in left:
      self._scene(index)
    # The shell may have turned Ctrl-C off for a background program.
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, signal.default_int_handler)
    running: dict[int, Process] = {}
    try:
      while left or running:
        while left and len(running) < at_once:
          index = left.pop(0)
          running[index] = Process(
            # A group of its own: Ctrl-C is not for the runs.
            prepare=[os.setsid],
            main=lambda index=index: print(json.dumps(self._do(index))),
          )
        for process in running.values():
          process.poll(0.05)
        for index in [i for i, p in running.items() if p.status is not None]:
          self._keep(index, running.pop(index))
    finally:
      for process in running.values():
        os.killpg(process.pid, signal.SIGKILL)
        process.finish()
      for run in self._folder.glob("*/run"):
        disks.unmount(run)

  def _kind(self, index: int) -> tuple[str, str]:
    """Returns (kind, model) of a fault."""
    turn, place = divmod(index, len(self._kinds))
    kind = self._kinds[place]
    return kind, KINDS[kind].model or self._models[turn % len(self._models)]

  def _scene(self, index: int) -> Scene:
    name, model = self._kind(index)
    key = model, KINDS[name].count
    if key not in self._scenes:
      folder = self._folder / f"scene_{key[0]}_{key[1]}"
      self._scenes[key] = Scene(folder, *key)
    return self._scenes[key]

  def _do(self, index: int) -> Fault:
    """Does a fault, until it comes about."""
    (name, model), began = self._kind(index), time.monotonic()
    for attempt in range(TRIES):
      seed = f"{self._seed}/{name}/{index}/{attempt}"
      place = self._folder / f"fault_{index}_{attempt}"
      fault = one(name, seed, self._scene(index), place)
      if fault["outcome"] != "missed":
        break
    return {
      "index": index,
      "kind": name,
      "model": model,
      "seed": seed,
      "misses": attempt,
      **fault,
      "seconds": time.monotonic() - began,
    }

  def _keep(self, index: int, process: Process) -> None:
    """Records and prints a fault that has been done."""
    if process.status:
      raise RuntimeError(f"fault {index} cannot be done: {process.errors}")
    fault = json.loads(process.output.splitlines()[-1])
    self.faults[index] = fault
    with self._record.open("a") as f:
      f.write(json.dumps(fault) + "\n")
    print(
      f"{len(self.faults):4} {fault['kind']:21}{fault['model']:7}"
      f"{fault['moment']:9.9} {fault['outcome']:9}{fault['seconds']:5.1f} s  "
      f"{fault['told'][:150]}",
      flush=True,
    )


def _read(record: pathlib.Path) -> list[Any]:
  """Returns the lines of a record; a kill may have cut off the last."""
  if not record.exists():
    return []
  lines = record.read_text().splitlines(keepends=True)
  whole = [line for line in lines if line.endswith("\n")]
  record.write_text("".join(whole))
  return [json.loads(line) for line in whole]


def one(name: str, seed: str, scene: Scene, place: pathlib.Path) -> Fault:
  """Does one fault; returns what came of it.

  Args:
    name: of its kind.
    seed: of what is random.
    scene: of the run.
    place: folder for its files; it stays if the run is lost.
  """
  kind, rng = KINDS[name], random.Random(seed)
  half = rng.random() < {"fresh": 0, "half": 1, "either": 0.5}[kind.begins]
  scene.begin(place / "run", half and not kind.mounts)
  trial = Trial(scene, rng, place, half)
  outcome, told = "survived", ""
  try:
    kind.disturb(trial)
    trial.survive()
    if not trial.hit:
      outcome = "missed"
  except Lost as error:
    outcome, told = "lost", str(error)
  finally:
    for process in trial.processes:
      process.signal(signal.SIGKILL)
    disks.unmount(trial.workdir)
  if outcome != "lost":
    shutil.rmtree(place)
  return {
    "outcome": outcome,
    "moment": trial.moment,
    "told": told or trial.told,
    "stopped": trial.stopped,
  }


def print_table(faults: list[Fault]) -> None:
  """Prints a line for each kind, all of them, and the slowest stop."""
  by_kind = collections.defaultdict(list)
  for fault in faults:
    by_kind[fault["kind"]].append(fault)
  rows = []
  for name, held in [*by_kind.items(), ("all", faults)]:
    counts = collections.Counter(fault["outcome"] for fault in held)
    told = sum(bool(f["told"]) for f in held if f["outcome"] == "survived")
    came = counts["survived"] + counts["lost"]
    numbers = (came, counts["survived"], told, counts["lost"], counts["missed"])
    rows.append([name, *map(str, numbers)])
  header = "fault, came about, survived, error in one line, lost, missed"
  print(page.table(header.split(", "), rows))
  if faults:
    print(f"{statistics.mean(f['seconds'] for f in faults):.1f} s a fault")
  stops = [f["stopped"] for f in faults if f["stopped"]]
  if stops:
    steps, saves, seconds = map(max, zip(*stops, strict=True))
    print(
      f"{len(stops)} stops: at most {steps} steps and {saves} saves began "
      f"after the signal; {seconds:.2f} s at most until all was saved"
    )
