"""What a study is, and the table and the plot that most studies have."""

import itertools
import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from benchmarks.harness import page, plots
from benchmarks.studies.plan import (
  RATES,
  SEEDS,
  TUNED,
  Entry,
  Outcome,
  Stage,
  outcome,
)
from benchmarks.studies.setting import Setting
from benchmarks.studies.store import Store

DASH = "-"  # where there is no number as yet


class Study(NamedTuple):
  """A question, and the cells that answer it.

  entries: the models of a size, the most telling ones first.
  table: the Markdown of the records so far; "" if there are none.
  plot: draws them; None: there is nothing to draw.
  stages: of `plan`, whether rates are searched for every model.
  """

  entries: Callable[[str], list[Entry]]
  table: Callable[[Store, str], str]
  plot: Callable[[Store, str], Figure | None]
  stages: tuple[Stage, ...] = TUNED

  @property
  def is_tuned(self) -> bool:
    return self.stages == TUNED


def number(value: float | None, form: str = ".3f") -> str:
  """Returns a number as text; a dash where there is none."""
  return DASH if value is None else format(value, form)


def spread(found: Outcome) -> str:
  """Returns "0.012 (3)": the range over 3 seeds; a dash for one seed."""
  if len(found.best) < 2:
    return DASH
  return f"{found.spread:.3f} ({len(found.best)})"


def differences(one: Outcome, other: Outcome) -> list[float]:
  """Returns the loss of one less that of another, for the seeds of both.

  Both read the same data with the same seed, so that this varies less.
  """
  losses = {x["seed"]: x["bits_per_byte"] for x in other.best}
  return [
    x["bits_per_byte"] - losses[x["seed"]]
    for x in one.best
    if x["seed"] in losses
  ]


def difference(one: Outcome, other: Outcome) -> float:
  """Returns the mean of `differences`."""
  return statistics.mean(differences(one, other))


def less(one: Outcome, other: Outcome) -> str:
  """Returns "-0.201 (0.095)": the mean of `differences`, and their range."""
  found = differences(one, other)
  text = number(statistics.mean(found), "+.3f")
  if one is other or len(found) < 2:
    return text
  return f"{text} ({max(found) - min(found):.3f})"


def rates(found: Outcome) -> str:
  """Returns the best rate, that of tables over it, and how many were tried."""
  rate, multiplier = found.rates
  return f"{rate:g} x {multiplier:g} ({len(found.tried)})"


def at_time(
  found: Outcome, step_seconds: float, seconds: float
) -> float | None:
  """Returns the loss of seed 0 after that many seconds of steps.

  It lies on the line between the two points of the curve; None: the training
  was shorter.
  """
  points = [
    (point["step"] * step_seconds, point["bits_per_byte"])
    for point in found.best[0]["curve"]
  ]
  for (x0, y0), (x1, y1) in itertools.pairwise(points):
    if x0 <= seconds <= x1 * (1 + 1e-9):
      return y0 + (y1 - y0) * (seconds - x0) / (x1 - x0)
  return None


def step_seconds(
  store: Store, setting: Setting, found: dict[str, Outcome]
) -> dict[str, float]:
  """Returns the seconds of a step by model, of those that were timed in turn.

  Seconds of steps that were not timed together cannot be compared.
  """
  times = store.times(setting.name)
  return {
    name: seconds
    for name, seconds in (times or {"step_seconds": {}})["step_seconds"].items()
    if name in found
  }


def outcomes(
  store: Store, setting: Setting, models: Sequence[str], is_tuned: bool = True
) -> dict[str, Outcome]:
  """Returns what is known, by model, in the order of the models."""
  found = {
    name: outcome(store, setting, name, is_tuned=is_tuned) for name in models
  }
  return {name: x for name, x in found.items() if x}


def comparison(
  store: Store, setting: Setting, against: str, paper: dict[str, str]
) -> str:
  """Returns a table of models that are compared with one of them.

  Args:
    store: of all records.
    setting: where the models are trained.
    against: the model whose loss is subtracted.
    paper: what the paper says of each model.
  """
  found = outcomes(store, setting, list(paper))
  if not found:
    return ""
  base, times = found.get(against), step_seconds(store, setting, found)
  shortest = setting.steps * min(times.values(), default=0.0)
  header = (
    "model",
    "bits per byte",
    "range (seeds)",
    f"less `{against}`",
    "at equal time",
    "ms a step",
    "rate x tables' (tried)",
    "M parameters",
    "k FLOPs",
    "tokens per parameter",
    "paper",
  )
  rows = []
  for name, x in found.items():
    record, seconds = x.best[0], times.get(name)
    counts = record["parameters"]
    rows.append(
      [
        f"`{name}`",
        number(x.mean),
        spread(x),
        less(x, base) if base else DASH,
        number(at_time(x, seconds, shortest) if seconds else None),
        number(1e3 * seconds if seconds else None, ".0f"),
        rates(x),
        number((counts["dense"] + counts["sparse"]) / 1e6, ".2f"),
        number(record["flops_per_token"] / 1e3, ".0f"),
        number(record["tokens_per_parameter"], ".2f"),
        paper[name] or DASH,
      ]
    )
  told = _told(header, *rows)
  return f"{setting.describe()}\n\n{page.table(told[0], told[1:])}"


def _told(*rows: Sequence[str]) -> list[list[str]]:
  """Returns the header and the rows without columns that tell nothing."""
  columns = [x for x in zip(*rows, strict=True) if set(x[1:]) != {DASH}]
  return [list(row) for row in zip(*columns, strict=True)]


def dots(
  store: Store, setting: Setting, models: Sequence[str], finding: str
) -> Figure | None:
  """Draws the loss of each model, the least on top; small dots are seeds."""
  unsorted = outcomes(store, setting, models)
  if not unsorted:
    return None
  found = dict(sorted(unsorted.items(), key=lambda x: x[1].mean))
  first = next(iter(found.values())).best[0]
  figure, (axes,) = plots.figure(
    f"{finding}: {next(iter(found))} has the least loss so far",
    first,
    size=(8, 1.2 + 0.28 * len(found)),
  )
  for place, (name, x) in enumerate(found.items()):
    color = plots.BLUE if "ultramem" in name else plots.GREY
    losses = [record["bits_per_byte"] for record in x.best]
    axes.plot(x.mean, place, "o", color=color, ms=8)
    axes.plot(losses, [place] * len(losses), ".", color="black", ms=4)
    axes.annotate(
      f"{x.mean:.3f}",
      (max(losses), place),
      xytext=(8, 0),
      textcoords="offset points",
      va="center",
    )
  axes.set_yticks(range(len(found)), list(found))
  axes.invert_yaxis()
  axes.margins(x=0.15)
  axes.set_xlabel(
    f"validation loss, bits per byte ({setting.name}, {first['tokens']:,} "
    "tokens)"
  )
  return figure


def grid(store: Store, size: str, study: Study) -> str:
  """Returns a table of all rates that were tried; "" if no model has two."""
  rows = []
  for x in study.entries(size):
    found = outcome(store, *x, is_tuned=study.is_tuned)
    if found and len(found.tried) > 1:
      losses = [
        f"{rate:g} x {multiplier:g}: {loss:.3f}"
        for (rate, multiplier), loss in sorted(found.tried.items())
      ]
      rows.append([x.setting.name, f"`{x.model}`", "; ".join(losses)])
  header = "setting", "model", "rate x tables': bits per byte of seed 0"
  return page.table(header, rows)


def state(store: Store, size: str, study: Study) -> str:
  """Returns a few sentences about how much of a study is done."""
  entries = study.entries(size)
  found = [outcome(store, *x, is_tuned=study.is_tuned) for x in entries]
  done = [x for x in found if x]
  if not done:
    return f"None of the {len(entries)} models has been trained yet."
  searched = sum(len(x.tried) >= len(RATES) for x in done)
  seeded = sum(len(x.best) == len(SEEDS) for x in done)
  search = (
    f"{searched} with {len(RATES)} pairs of rates or more, "
    if study.is_tuned
    else ""
  )
  return (
    f"{len(done)} of {len(entries)} models have been trained, {search}"
    f"{seeded} with {len(SEEDS)} seeds at the best pair."
  )
