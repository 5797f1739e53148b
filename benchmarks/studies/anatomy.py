"""UltraMem with each part taken out, and its twins with each part given.

The one part that a dense model, experts or product keys can take as they are
is the convolution. What of UltraMem's lead is left when they all have it? And
what gives UltraMem more: its convolution elsewhere, memories in more blocks,
more reads, wider values?
"""

import statistics

from matplotlib.figure import Figure

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
  "With the convolution": (
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
  "Without it": (
    ("ultramem, no conv", "ultramem, softmax, no conv"),
    ("dense", "moe 2 of 8", "pkm"),
  ),
}


def answer(store: Store, size: str) -> str:
  """Returns in a few sentences what the records say of the memory's worth."""
  settings = [Setting(size, data) for data in (OF_BYTES, OF_WORDS)]
  answers = [text for x in settings if (text := _answer(store, x))]
  return (
    "\n\n".join(answers) or "No two models that answer it are trained as yet."
  )


def _answer(store: Store, setting: Setting) -> str:
  """Returns the answer for one setting; "" if no twins are trained there."""
  told = []
  for name, (forms, twins) in GROUPS.items():
    ours, theirs = (study.outcomes(store, setting, x) for x in (forms, twins))
    if ours and theirs:
      told.append(f"{name}, {_lead(ours, theirs)}.")
  return f"At {setting.describe()} {' '.join(told)}" if told else ""


def _lead(ours: dict[str, Outcome], theirs: dict[str, Outcome]) -> str:
  """Returns what the best of ours has before the best of theirs.

  Both are chosen by seed 0, and compared over the seeds that both have.
  """
  (own, x), (twin, y) = (
    min(found.items(), key=lambda item: item[1].best[0]["bits_per_byte"])
    for found in (ours, theirs)
  )
  others = [
    f"`{name}` {z.mean:.3f}"
    for name, z in (next(iter(ours.items())), next(iter(theirs.items())))
    if name not in (own, twin)
  ]
  leads = study.differences(y, x)
  each = ", ".join(f"{lead:+.3f}" for lead in leads)
  seeds = f"seed by seed {each}" if len(leads) > 1 else "one seed"
  tried = min(len(x.tried), len(y.tried))
  lead = statistics.mean(leads)
  pairs = f"{tried} pair{'' if tried == 1 else 's'} of rates"
  return (
    f"`{own}` has {x.mean:.3f} bits per byte, its best twin `{twin}` "
    f"{y.mean:.3f}: a lead of **{lead:+.3f}** ({seeds}; {pairs}"
    f"{'; ' * bool(others)}{', '.join(others)})"
  )


STUDY = Study(entries, table, plot)
