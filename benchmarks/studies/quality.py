"""Dense models, experts and memories, each with and without the convolution."""

from matplotlib.figure import Figure

from benchmarks.studies import study
from benchmarks.studies.plan import Entry
from benchmarks.studies.setting import Setting
from benchmarks.studies.store import Store
from benchmarks.studies.study import Study

# With what the paper says: C4 validation loss at 151M, 1T tokens, of models
# with 2.0 B parameters but for the dense one (table 1), and the first row of
# the ladder (table 2), which has 1.7 B.
PAPER = {
  "ultramem": "2.67",
  "dense, conv": "",
  "moe 2 of 8, conv": "",
  "dense": "2.96",
  "moe 2 of 8": "",
  "pkm, conv": "",
  "pkm": "2.83",
  "ultramem, no conv": "",
  "ultramem_v2": "",
  "memory_plus, conv": "",
  "peer, conv": "",
  "moe 8 of 32, conv": "",
  "ultramem/32": "",
  "moe 2 of 32, conv": "",
  "ultramem_v2, no conv": "",
  "memory_plus": "",
  "peer": "",
  "moe 8 of 32": "",
  "ultramem/32, no conv": "",
  "moe 2 of 32": "2.63",
}


def entries(size: str) -> list[Entry]:
  return [Entry(Setting(size), model) for model in PAPER]


def table(store: Store, size: str) -> str:
  return study.comparison(store, Setting(size), "ultramem", PAPER)


def plot(store: Store, size: str) -> Figure | None:
  return study.dots(store, Setting(size), list(PAPER), "At equal FLOPs")


STUDY = Study(entries, table, plot)
