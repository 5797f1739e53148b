"""Facts that are recalled in phrases never seen: where a memory should win.

Models are trained from nothing on invented facts (`benchmarks.facts`), alone or
mixed into text: each is stated in all seen phrases, and asked in others. The
loss is that of the answers in the unseen phrases; where facts are mixed into
text, that of the text.
"""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.facts import facts as facts_lib
from benchmarks.facts import recall
from benchmarks.harness import page, plots
from benchmarks.studies import study
from benchmarks.studies.plan import Entry, Outcome, outcome
from benchmarks.studies.runner import Trained
from benchmarks.studies.setting import Setting, facts_name, num_facts
from benchmarks.studies.store import Store
from benchmarks.studies.study import Study
from ultramem_jax.model import Transformer
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.train.program import one_device

PROBE = "recall"
# How many facts, and the length of the training; from size m on, and with
# --quick.
SETS = {100: 4, 1000: 16, 10_000: 32}
LARGE, QUICK = {100_000: 64}, {100: 2}
MODELS = (
  "ultramem",
  "dense, conv",
  "moe 2 of 8, conv",
  "pkm, conv",
  "ultramem, no conv",
  "dense",
)
COLORS = (*plots.MODELS.values(), "#9467bd", "#8c564b")


def probe(trained: Trained) -> dict[str, Any]:
  """Returns the shares of facts recalled, and what guessing would recall."""
  config = trained.config
  count = num_facts(facts_name(trained.cell.fields))
  (facts,) = facts_lib.draw(count, config.seed)
  layout = one_device(config)
  loaded = TrainedModel(
    config,
    config.steps,
    Transformer(config.model, layout),
    trained.state.variables(),
    layout,
  )
  shares = recall.recall(loaded, trained.corpus.tokenizer, facts)
  return {"facts": count, "chance": facts_lib.chance(facts), **shares}


def _settings(size: str) -> list[Setting]:
  sets = {"xs": QUICK, "s": SETS}.get(size, SETS | LARGE)
  alone = [Setting(size, f"facts{count}", x) for count, x in sets.items()]
  return alone + [x._replace(data=f"bytes+{x.data}") for x in alone[:1]]


def entries(size: str) -> list[Entry]:
  return [
    Entry(setting, model, PROBE)
    for setting in _settings(size)
    for model in MODELS
  ]


def _found(store: Store, size: str) -> list[tuple[Setting, str, Outcome]]:
  found = (
    (setting, model, outcome(store, setting, model, PROBE))
    for setting in _settings(size)
    for model in MODELS
  )
  return [(setting, model, x) for setting, model, x in found if x]


def recalled(found: Outcome, split: str) -> float:
  """Returns the mean share of facts that the seeds recall."""
  shares = [record["measured"][split] for record in found.best]
  return sum(shares) / len(shares)


def table(store: Store, size: str) -> str:
  rows = []
  for setting, model, x in _found(store, size):
    record = x.best[0]
    counts = record["parameters"]
    parameters = counts["dense"] + counts["sparse"]
    facts = record["measured"]["facts"]
    unseen = recalled(x, "unseen")
    rows.append(
      [
        setting.data,
        f"`{model}`",
        study.number(x.mean),
        study.spread(x),
        study.number(100 * recalled(x, "seen"), ".1f"),
        study.number(100 * unseen, ".1f"),
        study.number(100 * record["measured"]["chance"], ".1f"),
        study.number(facts * unseen / parameters * 1e6, ".1f"),
        study.number(facts * unseen / record["flops_per_token"] * 1e6, ".1f"),
        study.rates(x),
      ]
    )
  header = (
    "data",
    "model",
    "bits per byte",
    "range (seeds)",
    "recall, seen phrases, %",
    "unseen phrases, %",
    "by chance, %",
    "facts per M parameters",
    "facts per M FLOPs of a token",
    "rate x tables' (tried)",
  )
  return page.table(header, rows)


def plot(store: Store, size: str) -> Figure | None:
  found = _found(store, size)
  if not found:
    return None
  figure, (axes,) = plots.figure(
    "Facts recalled in phrases never seen", found[0][2].best[0]
  )
  for color, model in zip(COLORS, MODELS, strict=True):
    of_model = [
      x
      for setting, name, x in found
      if name == model and "+" not in setting.data
    ]
    if of_model:
      axes.plot(
        [x.best[0]["measured"]["facts"] for x in of_model],
        [100 * recalled(x, "unseen") for x in of_model],
        marker="o",
        color=color,
        label=model,
      )
  axes.set_xscale("log")
  axes.set(xlabel="facts", ylabel="recalled, %", ylim=(0, None))
  axes.legend(fontsize=8)
  return figure


STUDY = Study(entries, table, plot)
