"""The page docs/does-the-memory-pay.md: its tables are those of the records."""

from collections.abc import Mapping

from benchmarks.harness import page, report
from benchmarks.studies import anatomy, study
from benchmarks.studies.store import Store
from benchmarks.studies.study import Study

PAGE = report.ROOT / "docs" / "does-the-memory-pay.md"
RESULTS = (
  "https://github.com/ultramem-jax/ultramem-jax/blob/main/benchmarks/results/"
  "studies"
)
# Sizes whose tables the page shows; the first is that of the answer.
SIZES = ("s", "m", "l", "xl", "xxl")


def plot_name(name: str, size: str) -> str:
  """Returns the name of the file of a study's plot."""
  return f"{name}.png" if size == SIZES[0] else f"{name}_{size}.png"


def tables(one: Study, store: Store) -> dict[str, str]:
  """Returns the tables of a study by size, of those that have records.

  That of a study which takes all sizes together stands there once.
  """
  found = {}
  for size in SIZES:
    table = one.table(store, size)
    if table and table not in found.values():
      found[size] = table
  return found


def blocks(studies: Mapping[str, Study], store: Store) -> dict[str, str]:
  """Returns the text of each block by name."""
  found = {"answer": anatomy.answer(store, SIZES[0])}
  for name, x in studies.items():
    parts = []
    for size, table in tables(x, store).items():
      plot = f"[The plot]({RESULTS}/{plot_name(name, size)})"
      done = study.state(store, size, x)
      parts += [f"Size {size}. {done}", table, plot]
      if grid := study.grid(store, size, x):
        parts += ["All rates that were tried:", grid]
    found[name] = "\n\n".join(parts) or study.state(store, SIZES[0], x)
  return found


def write(studies: Mapping[str, Study], store: Store) -> None:
  """Writes the page anew, if there is one."""
  page.write(PAGE, blocks(studies, store))
