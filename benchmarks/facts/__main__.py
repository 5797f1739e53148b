"""Teaching a model facts: methods beside each other, in recall and in harm.

  python -m benchmarks.facts --quick                    # a small model, minutes
  python -m benchmarks.facts                            # SmolLM2-135M-Instruct
  python -m benchmarks.facts --pretrained=runs/qwen     # an imported model

  recall     a set of invented facts: exact answers, greedy, in templates seen
             in training and in others, and to questions that need two facts;
             perplexity of general text beside the untouched model's
  continual  several sets, one after the other: what is left of the first
  capacity   larger sets in larger tables, until they are not stored
  cost       the time of a step, and bytes that the program holds

Each cell (a method, at a rate, with a seed) is written to results/facts.json
when it has been measured; a command that was killed goes on with the others.
--plot_only draws the cells on file, and writes their tables into
docs/facts-compared.md. A step of SmolLM2 takes 2 to 4 s on two
cores: name the methods and rates that you want, or use an accelerator.
"""

import pathlib

from absl import app, flags

from benchmarks.facts import backbone, capacity, methods, parts, plots, tables
from benchmarks.facts.stages import Scale, Stages
from benchmarks.facts.store import Cell, Store
from benchmarks.harness import page, report
from ultramem_jax.runs import compilation_cache

SMALL = Scale(
  steps=300,
  batch=8,
  seq_len=48,
  warm_steps=150,
  warm_batch=8,
  warm_len=128,
  taught_steps=300,
  count_batches=100,
  held_out_rows=32,
)
LARGE = Scale(
  steps=150,
  batch=16,
  seq_len=32,
  warm_steps=100,
  warm_batch=4,
  warm_len=128,
  taught_steps=200,
  count_batches=50,
  held_out_rows=8,
)
SMALL_STEPS = 500  # of the small model's own training

RUNS = flags.DEFINE_string("runs", "runs/facts", "Folder of the runs.")
QUICK = flags.DEFINE_bool("quick", False, "A small model, made in minutes.")
PRETRAINED = flags.DEFINE_string(
  "pretrained",
  "",
  "Workdir of an imported model in place of SmolLM2; results have its name.",
)
CHOSEN = flags.DEFINE_list(
  "methods", list(methods.COMPARED), "Methods, of those in methods.py."
)
SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds.", lower_bound=1)
RATES = flags.DEFINE_list(
  "rates", [], "Learning rates of all methods, in place of each one's three."
)
FACTS = flags.DEFINE_integer(
  "facts", 100, "Facts of a set, but in the part capacity.", lower_bound=1
)
STEPS = flags.DEFINE_integer(
  "steps",
  0,
  "Steps of a run, of the smallest set in the part capacity; 0: the model's "
  "own.",
)
SETS = flags.DEFINE_integer(
  "sets", 10, "Sets of the part continual.", lower_bound=2
)


def stages() -> tuple[str, Stages]:
  """Returns the name of the model that learns, and its runs."""
  name = backbone.model_name(QUICK.value, PRETRAINED.value)
  folder = pathlib.Path(RUNS.value, name).absolute()
  scale = SMALL if QUICK.value else LARGE
  scale = scale._replace(steps=STEPS.value or scale.steps)
  made = Stages(folder, pathlib.Path(PRETRAINED.value).absolute(), scale)
  made.prepare()
  if QUICK.value:
    made = made._replace(backbone=backbone.small(folder, SMALL_STEPS))
  elif not PRETRAINED.value:
    made = made._replace(backbone=backbone.smollm2(folder))
  return name, made


def cells(model: str, part: str, steps: int) -> list[Cell]:
  """Returns the cells of a part: all methods with a seed, then the next."""
  made = []
  for seed in range(SEEDS.value):
    for name in CHOSEN.value:
      method = methods.METHODS[name]
      rates = method.rates
      if name == "untouched":
        if part == "recall" and not seed:
          made.append(Cell(model, part, name, 0.0, seed, 0, FACTS.value))
        continue
      if RATES.value:
        rates = tuple(map(float, RATES.value))
      for rate in rates[: 1 if part == "cost" else None]:
        cell = Cell(model, part, name, rate, seed, steps, FACTS.value)
        if part == "continual":
          cell = cell._replace(sets=SETS.value)
        made += capacity.cells(cell) if part == "capacity" else [cell]
  return made


MEASURES = {
  "recall": parts.measure_recall,
  "continual": parts.measure_continual,
  "capacity": parts.measure_capacity,
  "cost": parts.measure_cost,
}


def draw(store: Store) -> None:
  """Prints the tables, and writes them into the page; writes the plots."""
  records, result = store.records(), store.result()
  models = dict.fromkeys([*tables.MODELS, *(x["model"] for x in records)])
  for name, table in tables.blocks(records, models).items():
    print(f"\n{name}\n\n{table}")
  if report.is_published():
    page.write(tables.PAGE, tables.blocks(records, tables.MODELS))
  drawn = {
    (x["model"], x["part"]) for x in records if x["method"] != "untouched"
  }
  for model, part in sorted(drawn):
    if part in plots.PARTS:
      figure = plots.PARTS[part](result, model)
      figure.savefig(report.path(f"facts_{model}_{part}", "png"), dpi=150)


def main(_: list[str]) -> None:
  compilation_cache.use()
  store = Store(report.path("facts"))
  if not flags.FLAGS.plot_only:
    model, made = stages()
    for part in PARTS.value:
      planned = cells(model, part, made.scale.steps)
      steps = sum(cell.steps * max(cell.sets, 1) for cell in planned)
      print(f"{part}: {len(planned)} cells, {steps:,} steps at most")
      for number, cell in enumerate(planned):
        print(f"[{number + 1}/{len(planned)}] {cell.name}", flush=True)
        if part == "capacity" and capacity.is_beyond(cell, store.records()):
          print("  left out: this table did not store a smaller set")
          continue
        measure = lambda c=cell, part=part: MEASURES[part](made, c)
        print(tables.line(store.measured(cell, measure)), flush=True)
        made.forget(cell.name)  # not before its record is on file
  draw(store)


if __name__ == "__main__":
  PARTS = report.define_parts(*MEASURES)
  app.run(main)
