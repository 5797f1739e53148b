"""Does a run survive? Faults of many kinds, at random moments.

  python -m benchmarks.faults [--count=300] [--seed=0] [--kinds=kill_save,...]

Each fault disturbs a run of a tiny model: it is killed, stopped, starved, or
its files are damaged. Then the fault is taken away, and the same command is run
again until the run ends. A run survives if parameters, moments, the place in
the data and metrics.jsonl equal those of a run that nothing disturbed, to the
bit; if no more than the steps since its last save were taken again; and if what
ended it was a signal, or one line that names what to mend. A fault that does
not come about, such as a kill after the end, is tried again; it counts for
nothing.

Kinds that need a disk of their own are left out where mounting is not allowed.
A fault takes two starts of the run, and as many run at once as there are cores.
Ctrl-C and kills lose nothing: run the same command again to continue. Writes
results/faults.json.

  python -m benchmarks.faults --parts=sigterm [--count=50]

asks runs to stop, in turn in each part of a run, at a random moment of it, and
reports what passes until all is saved. Writes results/faults_sigterm.json.

  python -m benchmarks.faults --parts=cost

measures what checkpoints of `tiny` cost beside its training, and what it costs
to know 1 GB of text again. Writes results/faults_cost.json.

  python -m benchmarks.faults --inputs=3000 [--properties=config,...]

tries inputs instead: files and settings that are almost right. Each is accepted
or refused in one line, and nothing is written outside its folder. `--show=100`
prints some of those that were accepted, with what was made of them. Writes
results/faults_inputs.json.
"""

import gc
import os
import pathlib
import shutil
import tempfile

import jax
from absl import app, flags

from benchmarks.faults import cost, stops
from benchmarks.faults.campaign import Campaign, print_table
from benchmarks.faults.kinds import KINDS
from benchmarks.faults.scene import MODELS
from benchmarks.harness import report

CHOSEN_PARTS = flags.DEFINE_list(
  "parts", ["faults"], "Of faults, sigterm and cost, those to do."
)
COUNT = flags.DEFINE_integer(
  "count", None, "Faults; 300, and 50 of the part sigterm.", lower_bound=1
)
SEED = flags.DEFINE_integer("seed", 0, "Seed of everything random.")
CHOSEN = flags.DEFINE_list("kinds", list(KINDS), "Kinds of faults, in turn.")
CHOSEN_MODELS = flags.DEFINE_list(
  "models",
  ["dense", "dense", "memory", "dense", "dense", "frozen"],
  f"Models of the rounds, in turn, of {', '.join(MODELS)}.",
)
AT_ONCE = flags.DEFINE_integer(
  "at_once", os.cpu_count() or 1, "Faults that run beside each other."
)
INPUTS = flags.DEFINE_integer(
  "inputs", 0, "Examples of input to try, instead of faults."
)
PROPERTIES = flags.DEFINE_list(
  "properties", [], "Only these properties; default: all."
)
SHOW = flags.DEFINE_integer("show", 0, "Accepted examples of input to print.")
for holder, known in (
  (CHOSEN_PARTS, ("faults", "sigterm", "cost")),
  (CHOSEN, KINDS),
  (CHOSEN_MODELS, MODELS),
):
  flags.register_validator(
    holder.name,
    lambda given, known=known: set(given) <= set(known),
    f"must be some of {', '.join(known)}",
  )


def faults(folder: pathlib.Path) -> None:
  """Does the campaign; a run that is lost leaves its files in the folder.

  Raises:
    SystemExit: a run was lost, or Ctrl-C.
  """
  record = report.path("faults", "partial.jsonl")
  commit, count = report.commit(), COUNT.value or 300
  campaign = Campaign(
    folder, record, CHOSEN.value, CHOSEN_MODELS.value, SEED.value, commit
  )
  try:
    campaign.run(count, AT_ONCE.value or 1)
  except KeyboardInterrupt:
    print_table(list(campaign.faults.values()))
    raise SystemExit(
      f"{len(campaign.faults)} of {count}; run the same command again to "
      "continue"
    ) from None
  found = [campaign.faults[index] for index in range(count)]
  print_table(found)
  # Not before: a fork of a process that has a device would hang.
  taken = {"machine": report.machine(), "commit": commit, "seed": SEED.value}
  report.write("faults", {**taken, "faults": found})
  record.unlink()
  if any(fault["outcome"] == "lost" for fault in found):
    raise SystemExit(f"{folder} holds what was lost")


def sigterm(folder: pathlib.Path) -> None:
  """Asks runs to stop; raises SystemExit if one waited for too much."""
  commit = report.commit()
  asked = stops.ask(folder, COUNT.value or 50, SEED.value)
  taken = {"machine": report.machine(), "commit": commit}
  report.write("faults_sigterm", {**taken, "stops": asked})
  stops.print_table(asked)
  if any(stop["failure"] for stop in asked):
    raise SystemExit(1)


def costs(folder: pathlib.Path) -> None:
  """Measures what saving and knowing the data again cost."""
  commit = report.commit()
  measured = cost.measure(folder)
  taken = {"machine": report.machine(), "commit": commit}
  report.write("faults_cost", {**taken, **measured})


def inputs() -> None:
  """Tries strange inputs; raises SystemExit if one does harm."""
  # The library is none of this package's own needs.
  from benchmarks.faults import inputs

  results = inputs.try_all(
    INPUTS.value, PROPERTIES.value, SEED.value, SHOW.value
  )
  taken = {"machine": report.machine(), "commit": report.commit()}
  report.write("faults_inputs", {**taken, "properties": results})
  if any(result["failure"] for result in results.values()):
    raise SystemExit(1)


PARTS = {"faults": faults, "sigterm": sigterm, "cost": costs}


def main(_) -> None:
  jax.config.update("jax_platforms", "cpu")
  # Forks share what has been imported as long as nobody looks through it.
  gc.freeze()
  if INPUTS.value:
    inputs()
    return
  for name in CHOSEN_PARTS.value:
    folder = pathlib.Path(tempfile.mkdtemp(prefix="faults_"))
    done = False
    try:
      PARTS[name](folder)
      done = True
    finally:
      if done or not any(folder.glob("fault_*")):
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
  report.define_flags()
  app.run(main)
