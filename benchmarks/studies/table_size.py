"""Loss by the rows of the tables (figure 6b), and by the reads of a row.

Everything but the rows, and with them the keys, stays the same: no width is
fitted, and FLOPs grow with the root of the rows.
"""

from matplotlib.figure import Figure

from benchmarks.harness import page, plots
from benchmarks.studies import study, zoo
from benchmarks.studies.plan import Entry, Outcome
from benchmarks.studies.setting import Setting
from benchmarks.studies.store import Store
from benchmarks.studies.study import Study

LENGTHS = (1, 2, 4)
COLORS = (plots.GREY, plots.GREEN, plots.BLUE)


def _name(rows: int) -> str:
  return f"ultramem, {rows} rows"


def entries(size: str) -> list[Entry]:
  return [
    Entry(Setting(size, length=length), _name(rows))
    for length in LENGTHS
    for rows in zoo.ROWS
  ]


def _found(store: Store, size: str) -> dict[int, dict[int, Outcome]]:
  """Returns what is known, by length and rows."""
  names = {_name(rows): rows for rows in zoo.ROWS}
  found = {}
  for length in LENGTHS:
    known = study.outcomes(store, Setting(size, length=length), list(names))
    found[length] = {names[name]: x for name, x in known.items()}
  return found


def reads_per_row(rows: int, found: Outcome) -> float:
  """Returns how often a row is read in the training, on average."""
  record = found.best[0]
  fields = record["fields"]
  # Two heads, as by default.
  return record["tokens"] * fields["model.memory.top_m"] * 2 / rows


def table(store: Store, size: str) -> str:
  rows = [
    [
      f"{rows:,}",
      f"{x.best[0]['tokens']:,}",
      study.number(reads_per_row(rows, x), ",.1f"),
      study.number(x.mean),
      study.spread(x),
      study.rates(x),
      study.number(x.best[0]["flops_per_token"] / 1e3, ".0f"),
    ]
    for found in _found(store, size).values()
    for rows, x in found.items()
  ]
  header = (
    "rows of a table",
    "tokens",
    "reads of a row",
    "bits per byte",
    "range (seeds)",
    "rate x tables' (tried)",
    "k FLOPs",
  )
  return page.table(header, rows)


def plot(store: Store, size: str) -> Figure | None:
  found = {k: v for k, v in _found(store, size).items() if v}
  if not found:
    return None
  first = next(iter(next(iter(found.values())).values())).best[0]
  figure, (by_rows, by_reads) = plots.figure(
    "The rows of the tables, and what is left of each when they are shared "
    "among more",
    first,
    panels=2,
    size=(4.8, 3.6),
    sharey=True,
  )
  for color, (length, of_length) in zip(COLORS, found.items(), strict=False):
    losses = [x.mean for x in of_length.values()]
    reads = [reads_per_row(rows, x) for rows, x in of_length.items()]
    label = f"{Setting(size, length=length).tokens:,} tokens"
    style = {"color": color, "marker": "o", "ms": 4}
    by_rows.plot(list(of_length), losses, label=label, **style)
    by_reads.plot(reads, losses, **style)
  plots.log_x(by_rows, zoo.ROWS)
  by_reads.set_xscale("log")
  by_rows.set(xlabel="rows of a table", ylabel="validation bits per byte")
  by_reads.set_xlabel("reads of a row in the training")
  by_rows.legend()
  return figure


STUDY = Study(entries, table, plot)
