"""The parts of the comparison: what is measured of a method."""

import dataclasses
import functools
import json
import math
import pathlib
import shutil
import statistics
import time
from typing import Any

import jax
import numpy as np

from benchmarks.facts import facts as facts_lib
from benchmarks.facts import general, known, recall
from benchmarks.facts.methods import METHODS, Method
from benchmarks.facts.stages import Stages
from benchmarks.facts.store import Cell
from benchmarks.harness import runs, train_steps
from ultramem_jax import data
from ultramem_jax.runs import row_counts
from ultramem_jax.runs.files import write_atomically
from ultramem_jax.runs.row_counts import RowCounts
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.config import parse

TIMED_STEPS = 5

Record = dict[str, Any]


def examine(
  stages: Stages,
  workdir: pathlib.Path,
  sets: dict[str, list[facts_lib.Fact]],
  measures_harm: bool = True,
) -> Record:
  """Returns what the model of a run recalls, its perplexities, what it knew.

  Args:
    stages: of the comparison.
    workdir: of the run.
    sets: sets of facts by name, of which the recall is taken.
    measures_harm: False: only the recall.
  """
  loaded = load_lib.load(workdir)
  tokenizer = data.open(loaded.config).tokenizer
  found = {
    "recall": {
      name: recall.recall(loaded, tokenizer, facts)
      for name, facts in sets.items()
    }
  }
  if measures_harm:
    rows = stages.scale.held_out_rows
    found |= {
      "perplexity": general.perplexities(loaded, stages.general, rows),
      "known": known.share(loaded, tokenizer),
    }
  return found


def method_of(cell: Cell) -> Method:
  """Returns the method of a cell, with a table of the cell's rows."""
  method = METHODS[cell.method]
  if not (cell.rows and method.memory):
    return method
  memory = dataclasses.replace(method.memory, num_keys=math.isqrt(cell.rows))
  return dataclasses.replace(method, memory=memory)


def measure_recall(stages: Stages, cell: Cell) -> Record:
  """Teaches a model one set of facts."""
  (facts,) = facts_lib.draw(cell.facts, cell.seed)
  chance = {"chance": facts_lib.chance(facts)}
  if not cell.steps:
    return chance | examine(stages, stages.backbone, {"all": facts})
  stages = stages._replace(scale=stages.scale._replace(steps=cell.steps))
  run = (cell.name, method_of(cell), cell.rate, cell.seed, facts)
  began = time.perf_counter()
  workdir = stages.taught(*run)
  record = {
    "seconds": time.perf_counter() - began,
    "step_seconds": statistics.median(
      one["step_seconds"] for one in runs.records(workdir, "timing")
    ),
    "loss": runs.curve(workdir, "loss"),
  }
  record |= chance | examine(stages, workdir, {"all": facts})
  return record


def measure_continual(stages: Stages, cell: Cell) -> Record:
  """Teaches a model sets of facts, one after the other.

  What is known is kept set by set: a command that was killed goes on with the
  set after it.
  """
  sets = facts_lib.draw(cell.facts, cell.seed, cell.sets)
  method = method_of(cell)
  known_file = stages.folder / f"{cell.name}_known.json"
  history = json.loads(known_file.read_text()) if known_file.exists() else []
  workdir, counts, held, reads = None, None, None, []
  if method.protects:
    held = row_counts.load(stages.counted(method, cell.seed), "counts")
  for number, facts in enumerate(sets):
    name = f"{cell.name}_set_{number}"
    previous, workdir = workdir, stages.folder / name
    is_new, is_last = number >= len(history), number == cell.sets - 1
    if is_new:
      run = (name, method, cell.rate, cell.seed, facts)
      stages.taught(*run, start=previous, counts=counts)
    if method.counts and (method.protects or is_last or not number):
      assert method.memory
      base = stages.base(method.memory, cell.seed)
      if is_new:
        # What is to stay is what the set reads now that it has been learned.
        stages.count_facts(workdir if method.protects else base, name)
      reads.append(stages.reads(name))
      if held:
        counts = stages.folder / f"{cell.name}_counts.safetensors"
        merged = functools.reduce(row_counts.merged, reads, held)
        row_counts.save(counts, merged)
    if is_new:
      asked = {"first": sets[0]} | ({"newest": facts} if number else {})
      if is_last:
        asked["all"] = [fact for facts in sets for fact in facts]
      history.append(examine(stages, workdir, asked, measures_harm=is_last))
      write_atomically(known_file, json.dumps(history).encode())
      print(f"  set {number + 1}: {history[-1]['recall']}", flush=True)
      if previous:
        shutil.rmtree(previous)
  alike = {"reads_alike": correlation(reads[0], reads[-1])} if reads else {}
  every = [fact for facts in sets for fact in facts]
  return {"history": history, "chance": facts_lib.chance(every), **alike}


def correlation(one: RowCounts, other: RowCounts) -> float:
  """Returns how alike two texts read the rows of tables, 1 at most."""
  reads = [
    np.concatenate([x.reads[path] for path in sorted(x.reads)])
    for x in (one, other)
  ]
  return float(np.corrcoef(reads)[0, 1])


def measure_capacity(stages: Stages, cell: Cell) -> Record:
  """Teaches a set of facts to a memory with a table of the cell's rows."""
  config = parse(
    stages.config(cell.name, method_of(cell), cell.rate, cell.seed, [])
  )
  memory = config.model.memory
  tables = 1 if memory.shares_table else len(config.model.spans)
  values = tables * memory.num_rows * memory.value_dim
  return {"table_bytes": 4 * values, **measure_recall(stages, cell)}


def measure_cost(stages: Stages, cell: Cell) -> Record:
  """Times a step on facts, and counts the bytes that its program holds."""
  (facts,) = facts_lib.draw(cell.facts, cell.seed)
  run = (cell.name, method_of(cell), cell.rate, cell.seed, facts)
  config = parse(stages.config(*run))
  step, held = train_steps.stepper(config)
  seconds = []
  for _ in range(1 + TIMED_STEPS):
    began = time.perf_counter()
    jax.block_until_ready(step())
    seconds.append(time.perf_counter() - began)
  return {"step_seconds": statistics.median(seconds[1:]), "bytes": held}
