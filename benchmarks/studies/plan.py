"""Which cells a study needs, in which order, and what they tell.

One rule tunes every model, by the loss of seed 0 after the last step:

  1. the learning rate: 1/2, 1 and 2 times the size's own, and further by 2
     while the best is at an edge, up to `MAX_RATES` of them
  2. at the best rate, the multipliers of the tables' rate, and further by 3
     while the largest is the best, up to `MAX_MULTIPLIERS` of them
  3. at the best of both, the other seeds

A model that is another with a change begins at the best rates of that one, and
a model in another setting at those of `PLAIN`, as a factor on the size's own
rate. Some studies search no further. A stage goes over all models before the
next begins, so that a study that is stopped has something to say of all.
"""

import itertools
import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from benchmarks.studies import fit, zoo
from benchmarks.studies.cell import Cell
from benchmarks.studies.setting import SIZES, Setting
from benchmarks.studies.store import Record, Store

SEEDS = (0, 1, 2)
PLAIN = Setting("s")  # where most rates are searched
RATES = (1.0, 0.5, 2.0)  # times the size's own; the first one first
MAX_RATES = 5
MAX_MULTIPLIERS = 8


class Entry(NamedTuple):
  """A model where it is compared.

  probe: what else is measured of it.
  """

  setting: Setting
  model: str
  probe: str = ""

  def cell(self, rate: float, multiplier: float, seed: int = 0) -> Cell:
    """Returns the cell of a rate, as a factor on the size's own."""
    made = fit.make_cell(
      self.setting,
      self.model,
      rate * self.setting.shape.learning_rate,
      multiplier,
      seed,
    )
    return Cell(made.model, made.setting, made.fields, self.probe)

  @property
  def multipliers(self) -> tuple[float, ...]:
    """The multipliers of the tables' rate to try; one for a model without."""
    model = zoo.models(self.setting)[self.model]
    has_table = "memory.kind" in model.fields
    return model.multipliers if has_table else zoo.MULTIPLIERS[:1]


def _loss(store: Store, cell: Cell) -> float | None:
  record = store.get(cell)
  return record["bits_per_byte"] if record else None


def _rates(entry: Entry, store: Store) -> list[Cell]:
  """Returns the cells of all rates that the rule asks for as yet."""
  first = entry.multipliers[0]
  rates = list(RATES)
  while True:
    cells = [entry.cell(x, first) for x in rates]
    losses = [loss for x in cells if (loss := _loss(store, x)) is not None]
    if len(losses) < len(rates) or len(rates) >= MAX_RATES:
      return cells
    best = rates[losses.index(min(losses))]
    if best not in (min(rates), max(rates)):
      return cells
    rates.append(best * (2 if best == max(rates) else 0.5))


def _best(cells: list[Cell], store: Store) -> Cell:
  """Returns the cell with the least loss of those that are done."""
  done = {
    i: loss
    for i, x in enumerate(cells)
    if (loss := _loss(store, x)) is not None
  }
  return cells[min(done, key=lambda i: done[i])]


def _grid(entry: Entry, store: Store) -> list[Cell]:
  """Returns the cells of all rates, and of all multipliers at the best."""
  cells = _rates(entry, store)
  if any(_loss(store, x) is None for x in cells):
    return cells
  rate = _best(cells, store).fields["optim.learning_rate"]
  factor = rate / entry.setting.shape.learning_rate
  multipliers = list(entry.multipliers)
  while True:
    tried = [entry.cell(factor, k) for k in multipliers]
    losses = [loss for x in tried if (loss := _loss(store, x)) is not None]
    largest = max(multipliers)
    if (
      len(losses) < len(tried)
      or len(tried) in (1, MAX_MULTIPLIERS)  # one: a model without tables
      or multipliers[losses.index(min(losses))] < largest
    ):
      return cells + tried[1:]
    multipliers.append(3 * largest)


def _seeds(entry: Entry, store: Store) -> list[Cell]:
  """Returns the cells of all seeds at the best rates of all that were tried."""
  pair = _pair(entry, outcome(store, *entry))
  return [entry.cell(*pair, seed) for seed in SEEDS]


def _near(entry: Entry, store: Store) -> list[Cell]:
  """Returns the cell at the best rates of the nearest model that has some.

  Near are the model that it is like, in the same setting; and itself, and the
  model that it is like, in the plain one.
  """
  like = zoo.models(entry.setting)[entry.model].like
  near = [
    entry._replace(model=like, probe=""),
    _plain(entry),
    _plain(entry)._replace(model=like),
  ]
  found = (outcome(store, *x) for x in near if x.model and x != entry)
  best = next((x for x in found if x), None)
  return [entry.cell(*_pair(entry, best))]


def _plain(entry: Entry) -> Entry:
  """Returns the same model in the setting where most rates are searched."""
  size = min(entry.setting.size, PLAIN.size, key=list(SIZES).index)
  return Entry(PLAIN._replace(size=size), entry.model)


def _pair(entry: Entry, found: "Outcome | None") -> tuple[float, float]:
  """Returns the best pair of another model, the rate as a factor.

  Of a model without tables, the multiplier is its own. None: the first pair.
  """
  if not found:
    return RATES[0], entry.multipliers[0]
  _, multiplier = found.rates
  has_table = len(entry.multipliers) > 1
  return found.factor, multiplier if has_table else entry.multipliers[0]


def _as_plain(entry: Entry, store: Store) -> tuple[float, float]:
  """Returns the pair that is best for the model in the plain setting."""
  return _pair(entry, outcome(store, *_plain(entry)))


def _untuned(entry: Entry, store: Store) -> list[Cell]:
  """Returns the cell at the rates of the plain setting."""
  return [entry.cell(*_as_plain(entry, store))]


def _untuned_seeds(entry: Entry, store: Store) -> list[Cell]:
  """Returns the cells of all seeds at the rates of the plain setting."""
  return [entry.cell(*_as_plain(entry, store), seed) for seed in SEEDS]


Stage = Callable[[Entry, Store], list[Cell]]
# The rule above; rates that are best in the plain setting; and a first look.
TUNED: tuple[Stage, ...] = (_near, _rates, _grid, _seeds)
UNTUNED: tuple[Stage, ...] = (_untuned, _untuned_seeds)
QUICK: tuple[Stage, ...] = (_near,)


def pending(
  entries: list[Entry], store: Store, stages: tuple[Stage, ...] = TUNED
) -> Iterator[Cell]:
  """Yields the cells that are missing, the most telling ones first.

  Each is to be trained and added to the store before the next is asked for.

  Args:
    entries: the models of a study.
    store: of all records.
    stages: cells that a model needs, given the records so far; each of these
      goes over all models.
  """
  for stage in stages:
    for entry in entries:
      while missing := [x for x in stage(entry, store) if store.get(x) is None]:
        yield missing[0]


def pending_of_all(
  plans: Mapping[str, tuple[list[Entry], tuple[Stage, ...]]], store: Store
) -> Iterator[tuple[str, Cell]]:
  """Yields (study, cell) of what several studies lack, as `pending`.

  A stage goes over all studies before the next begins.

  Args:
    plans: the models of each study, and the stages of their cells.
    store: of all records.
  """
  for turn in itertools.zip_longest(*(stages for _, stages in plans.values())):
    for (name, (entries, _)), stage in zip(plans.items(), turn, strict=True):
      for cell in pending(entries, store, (stage,) if stage else ()):
        yield name, cell


class Outcome(NamedTuple):
  """What the records tell of a model.

  best: the records of the seeds at its best rates, seed 0 first.
  tried: losses of seed 0 by (learning rate, multiplier).
  own_rate: the learning rate of its size.
  """

  best: list[Record]
  tried: dict[tuple[float, float], float]
  own_rate: float

  @property
  def factor(self) -> float:
    """The best learning rate, as a factor on the size's own."""
    return self.rates[0] / self.own_rate

  @property
  def rates(self) -> tuple[float, float]:
    """The best pair."""
    return min(self.tried, key=lambda x: self.tried[x])

  @property
  def mean(self) -> float:
    return statistics.mean(record["bits_per_byte"] for record in self.best)

  @property
  def spread(self) -> float:
    """The largest loss of a seed less the least."""
    losses = [record["bits_per_byte"] for record in self.best]
    return max(losses) - min(losses)


def outcome(
  store: Store,
  setting: Setting,
  model: str,
  probe: str = "",
  is_tuned: bool = True,
) -> Outcome | None:
  """Returns what is known of a model; None: nothing.

  The records are found by the names in them; no model is made.

  Args:
    store: of all records.
    setting, model, probe: as of an `Entry`.
    is_tuned: False: only the best rates of the plain setting count, though
      another study may have tried more.
  """
  records = [
    record
    for record in store.cells()
    if (record["setting"], record["model"], record["probe"])
    == (setting.name, model, probe)
  ]

  def rates(record):
    return record["learning_rate"], record["value_lr_multiplier"]

  own_rate = setting.shape.learning_rate
  if not is_tuned:
    factor, multiplier = _as_plain(Entry(setting, model, probe), store)
    wanted = factor * own_rate, multiplier
    records = [record for record in records if rates(record) == wanted]
  tried = {rates(r): r["bits_per_byte"] for r in records if r["seed"] == 0}
  if not tried:
    return None
  chosen = Outcome([], tried, own_rate).rates
  best = [record for record in records if rates(record) == chosen]
  return Outcome(sorted(best, key=lambda r: r["seed"]), tried, own_rate)
