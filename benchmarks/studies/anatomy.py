"""UltraMem with each part taken out, and its twins with each part given.

The one part that a dense model, experts or product keys can take as they are
is the convolution. What of UltraMem's lead is left when they all have it?
"""

from matplotlib.figure import Figure

from benchmarks.studies import study
from benchmarks.studies.plan import Entry
from benchmarks.studies.setting import Setting
from benchmarks.studies.store import Store
from benchmarks.studies.study import Study

# Models by what is asked of them, with what table 2 of the paper (151M, 1T
# tokens) says of a part: the validation loss with it less that without it.
PAPER = {
  "ultramem": "",
  "dense, conv": "",
  "ultramem, no conv": "conv 0.000",
  "dense": "",
  "moe 2 of 8, conv": "",
  "moe 2 of 8": "",
  "pkm, conv": "",
  "pkm": "",
  "ultramem, one rate": "decay -0.022",
  "dense, conv in all blocks": "",
  "ultramem, no skip": "split and skip -0.015",
  "ultramem, no IVE": "IVE -0.017",
  "ultramem, no TDQKR, no MCS": "TDQKR -0.008, MCS -0.003",
  "ultramem, no MCS": "MCS -0.003",
  "ultramem, official init": "init -0.003",
  "ultramem, softmax, official init": "no softmax -0.006",
  "ultramem, no norm, official init": "norm +0.001",
  "ultramem, conv before the MLP": "",
  "ultramem, conv in both": "",
}
DATA = ("bytes", "bpe4096")


def entries(size: str) -> list[Entry]:
  return [Entry(Setting(size, data), model) for data in DATA for model in PAPER]


def table(store: Store, size: str) -> str:
  parts = []
  for data in DATA:
    setting = Setting(size, data)
    found = study.outcomes(store, setting, list(PAPER))
    if found:
      text = study.comparison(found, "dense, conv", PAPER)
      parts.append(f"{setting.describe()}\n\n{text}")
  return "\n\n".join(parts)


def plot(store: Store, size: str) -> Figure | None:
  return study.bars(
    store, Setting(size), list(PAPER), "UltraMem, its parts and its twins"
  )


STUDY = Study(entries, table, plot)
