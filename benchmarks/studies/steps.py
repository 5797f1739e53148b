"""Studies of single changes: the ladder of table 2, the sweeps of table 3."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.harness import page, plots
from benchmarks.studies import study
from benchmarks.studies.plan import Entry
from benchmarks.studies.setting import Setting
from benchmarks.studies.store import Store
from benchmarks.studies.study import Study

# Changes of the C4 validation loss in the paper, against the model before.
LADDER = {
  "pkm": None,
  "no_softmax": -0.006,
  "half_width": -0.022,
  "shared_query": 0.003,
  "split": -0.015,
  "norm": 0.001,
  "ive": -0.017,
  "tdqkr": -0.008,
  "mcs": -0.003,
  "init": -0.003,
  "lr_decay": -0.022,
  "conv": 0.0,
}
# Against the first of each sweep.
SWEEPS = {
  "ive": {1: None, 4: -0.017, 9: -0.025, 16: -0.027},
  "tdqkr": {1: None, 2: -0.008, 3: -0.0084, 4: -0.0082},
  "mcs": {1: None, 2: -0.003, 4: 0.001, 8: 0.006},
}


def _ladder_pairs() -> dict[str, tuple[str, float | None]]:
  """Returns the model before, and the paper's change, by model."""
  names = [f"ladder {row}" for row in LADDER]
  before = [names[0], *names[:-1]]
  return dict(
    zip(names, zip(before, LADDER.values(), strict=True), strict=True)
  )


def _sweep_pairs() -> dict[str, tuple[str, float | None]]:
  return {
    f"sweep {name}_{value}": (f"sweep {name}_1", change)
    for name, values in SWEEPS.items()
    for value, change in values.items()
  }


Pairs = dict[str, tuple[str, float | None]]


def changes(
  store: Store, size: str, pairs: Pairs
) -> list[tuple[str, float, float | None, float | None]]:
  """Returns (model, loss, change here, change in the paper) of what is done."""
  found = study.outcomes(store, Setting(size), list(pairs))
  rows = []
  for name, x in found.items():
    before, paper = pairs[name]
    base = found.get(before)
    change = study.difference(x, base) if base and before != name else None
    rows.append((name, x.mean, change, paper))
  return rows


def _agreement(change: float | None, paper: float | None) -> str:
  if change is None or not paper:
    return study.DASH
  return "yes" if (change < 0) == (paper < 0) else "no"


def _table(store: Store, size: str, pairs: Pairs) -> str:
  found = study.outcomes(store, Setting(size), list(pairs))
  rows = [
    [
      f"`{name}`",
      study.number(loss),
      study.spread(found[name]),
      study.rates(found[name]),
      study.number(change, "+.3f"),
      study.number(paper, "+.4g"),
      _agreement(change, paper),
    ]
    for name, loss, change, paper in changes(store, size, pairs)
  ]
  header = (
    "model",
    "bits per byte",
    "range (seeds)",
    "rate x tables' (tried)",
    "change",
    "paper, nats",
    "same sign",
  )
  table = page.table(header, rows)
  return f"{Setting(size).describe()}\n\n{table}" if rows else ""


def _plot(store: Store, size: str, pairs: Pairs, finding: str) -> Figure | None:
  rows = [
    (name, here, there)
    for name, _, here, there in changes(store, size, pairs)
    if here is not None and there is not None
  ]
  if not rows:
    return None
  found = study.outcomes(store, Setting(size), list(pairs))
  figure, (here, paper) = plots.figure(
    finding,
    next(iter(found.values())).best[0],
    panels=2,
    size=(4.6, 1 + 0.3 * len(rows)),
  )
  plots.bars(here, {name: change for name, change, _ in rows}, "{:+.3f}")
  plots.bars(paper, {name: change for name, _, change in rows}, "{:+.4f}")
  for axes in (here, paper):
    axes.margins(x=0.45)  # room for numbers on both sides
  here.set_xlabel("change of the validation loss here, bits per byte")
  paper.set_xlabel("in the paper, nats per token")
  return figure


def _study(pairs: Pairs, finding: str) -> Study:
  names: Sequence[str] = list(pairs)
  return Study(
    lambda size: [Entry(Setting(size), name) for name in names],
    lambda store, size: _table(store, size, pairs),
    lambda store, size: _plot(store, size, pairs, finding),
  )


LADDER_STUDY = _study(
  _ladder_pairs(), "From PKM to UltraMem: what each change does"
)
SWEEPS_STUDY = _study(
  _sweep_pairs(), "Expansion, rank and cores, against 1 of each"
)
