"""UltraMem with each part taken out, and its twins with each part given.

The one part that a dense model, experts or product keys can take as they are
is the convolution. What of UltraMem's lead is left when they all have it? And
what gives UltraMem more: its convolution elsewhere, memories in more blocks,
more reads, wider values?
"""

import statistics

from matplotlib.figure import Figure

from benchmarks.harness import page
from benchmarks.studies import study
from benchmarks.studies.plan import Entry, Outcome
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
  "pkm, conv before the MLP": "",
  "moe 8 of 32, conv": "",
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
  "ultramem, softmax, no conv": "",
  "ultramem, softmax, conv before the MLP": "",
  "ultramem, conv in both": "",
  "ultramem, in all blocks": "",
  "ultramem, top-m doubled": "",
  "ultramem, values twice as wide": "",
}
OF_BYTES, OF_WORDS = "bytes", "bpe4096"
# Models that are also trained on the tokens of a BPE.
OF_BOTH = [
  *list(PAPER)[:9],
  "ultramem, softmax, no conv",
  "ultramem, conv before the MLP",
  "ultramem, softmax, official init",
  "ultramem, softmax, conv before the MLP",
]


def entries(size: str) -> list[Entry]:
  of_bytes = [Entry(Setting(size, OF_BYTES), model) for model in PAPER]
  of_words = [Entry(Setting(size, OF_WORDS), model) for model in OF_BOTH]
  return of_bytes if size == "xs" else of_bytes + of_words


def table(store: Store, size: str) -> str:
  tables = [
    study.comparison(store, Setting(size, data), "dense, conv", PAPER)
    for data in (OF_BYTES, OF_WORDS)
  ]
  return "\n\n".join(x for x in tables if x)


def plot(store: Store, size: str) -> Figure | None:
  return study.dots(
    store, Setting(size), list(PAPER), "Of UltraMem, its parts and its twins"
  )


# Where the lead is taken: of forms of UltraMem, the published one first, over
# twins, the dense one first.
GROUPS = {
  "with": (
    (
      "ultramem",
      "ultramem, conv before the MLP",
      "ultramem, softmax, official init",
      "ultramem, softmax, conv before the MLP",
    ),
    (
      "dense, conv",
      "moe 2 of 8, conv",
      "moe 8 of 32, conv",
      "pkm, conv",
      "pkm, conv before the MLP",
    ),
  ),
  "without": (
    ("ultramem, no conv", "ultramem, softmax, no conv"),
    ("dense", "moe 2 of 8", "pkm"),
  ),
}


ANSWER = (
  *("text", "convolution", "best form of UltraMem", "bits per byte"),
  *("its best twin", "bits per byte", "UltraMem leads by", "seed by seed"),
  *("`ultramem`", "`dense`"),
)


def answer(store: Store, size: str) -> str:
  """Returns the table that says what the memory is worth."""
  settings = [Setting(size, data) for data in (OF_BYTES, OF_WORDS)]
  rows = [
    [setting.data, name, *_lead(ours, theirs)]
    for setting in settings
    for name, (forms, twins) in GROUPS.items()
    if (ours := study.outcomes(store, setting, forms))
    and (theirs := study.outcomes(store, setting, twins))
  ]
  if not rows:
    return "No two models that answer it are trained as yet."
  return page.table(ANSWER, rows)


def _lead(ours: dict[str, Outcome], theirs: dict[str, Outcome]) -> list[str]:
  """Returns what the best of ours has before the best of theirs.

  Both are chosen by seed 0, and compared over the seeds that both have.
  """
  (own, x), (twin, y) = (
    min(found.items(), key=lambda item: item[1].best[0]["bits_per_byte"])
    for found in (ours, theirs)
  )
  leads = study.differences(y, x)
  each = ", ".join(f"{lead:+.3f}" for lead in leads)
  return [
    *(f"`{own}`", f"{x.mean:.3f}", f"`{twin}`", f"{y.mean:.3f}"),
    f"**{statistics.mean(leads):+.3f}**",
    each if len(leads) > 1 else "one seed",
    *(f"{next(iter(found.values())).mean:.3f}" for found in (ours, theirs)),
  ]


STUDY = Study(entries, table, plot)
