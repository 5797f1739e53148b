"""The parts of the comparison: what is measured of a method."""

import pathlib
import shutil
import statistics
import time
from typing import Any

from benchmarks.facts import facts as facts_lib
from benchmarks.facts import general, recall
from benchmarks.facts.methods import METHODS
from benchmarks.facts.stages import Stages
from benchmarks.facts.store import Cell
from benchmarks.harness import runs
from ultramem_jax import data
from ultramem_jax.serve import load as load_lib

SETS = 10  # of the part "continual", one after the other
Record = dict[str, Any]


def examine(
  stages: Stages, workdir: pathlib.Path, sets: dict[str, list[facts_lib.Fact]]
) -> Record:
  """Returns what the model of a run tells, and its perplexities.

  Args:
    stages: of the comparison.
    workdir: of the run.
    sets: sets of facts by name, of which the recall is taken.
  """
  loaded = load_lib.load(workdir)
  tokenizer = data.open(loaded.config).tokenizer
  recalls = {
    name: recall.recall(loaded, tokenizer, facts)
    for name, facts in sets.items()
  }
  rows = stages.scale.held_out_rows
  return {
    "recall": recalls,
    "perplexity": general.perplexities(loaded, stages.general, rows),
  }


def measure_recall(stages: Stages, cell: Cell) -> Record:
  """Teaches a model one set of facts."""
  (facts,) = facts_lib.draw(cell.facts, cell.seed)
  method, chance = METHODS[cell.method], facts_lib.chance(facts)
  if cell.method == "untouched":
    found = examine(stages, stages.backbone, {"all": facts})
    return {**found, "chance": chance}
  began = time.perf_counter()
  workdir = stages.taught(cell.name, method, cell.rate, cell.seed, facts)
  record = {
    "seconds": time.perf_counter() - began,
    "step_seconds": step_seconds(workdir),
    "loss": runs.curve(workdir, "loss"),
    "chance": chance,
  }
  record |= examine(stages, workdir, {"all": facts})
  shutil.rmtree(workdir)
  return record


def measure_continual(stages: Stages, cell: Cell) -> Record:
  """Teaches a model ten sets of facts, one after the other."""
  sets = facts_lib.draw(cell.facts, cell.seed, SETS)
  method = METHODS[cell.method]
  workdir, history = None, []
  for number, facts in enumerate(sets):
    name = f"{cell.name}_set_{number}"
    taught = stages.taught(
      name, method, cell.rate, cell.seed, facts, start=workdir
    )
    asked = {"first": sets[0], "newest": facts}
    if number == SETS - 1:
      asked["all"] = [fact for one in sets for fact in one]
    history.append(examine(stages, taught, asked))
    print(f"  set {number + 1}: {history[-1]['recall']}", flush=True)
    if workdir:
      shutil.rmtree(workdir)
    workdir = taught
  if workdir:
    shutil.rmtree(workdir)
  return {"history": history}


def step_seconds(workdir: pathlib.Path) -> float:
  """Returns the median time of a step, as the run has logged it."""
  return statistics.median(
    record["step_seconds"] for record in runs.records(workdir, "timing")
  )
