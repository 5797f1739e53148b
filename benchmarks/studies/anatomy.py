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
OF_BYTES, OF_WORDS = "bytes", "bpe4096"
# Models that are also trained on the tokens of a BPE.
OF_BOTH = list(PAPER)[:8]


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
  return study.bars(
    store, Setting(size), list(PAPER), "UltraMem, its parts and its twins"
  )


TWINS = ("dense, conv", "moe 2 of 8, conv", "pkm, conv")
PAIRS = {"ultramem": TWINS, "ultramem, no conv": ("dense", "moe 2 of 8", "pkm")}


def leads(store: Store, size: str) -> dict[str, tuple[str, float]]:
  """Returns the best twin of UltraMem and its loss less UltraMem's.

  With the convolution and without it, by UltraMem's name; where both are known.
  """
  found = {}
  for ultra, twins in PAIRS.items():
    known = study.outcomes(store, Setting(size), [ultra, *twins])
    own = known.pop(ultra, None)
    if own and known:
      best = min(known, key=lambda x: known[x].mean)
      found[ultra] = best, known[best].mean - own.mean
  return found


def answer(store: Store, size: str) -> str:
  """Returns in a few sentences what the records say of the memory's worth."""
  setting = Setting(size)
  known = study.outcomes(store, setting, list(PAPER))
  words = []
  for ultra, (twin, lead) in leads(store, size).items():
    seeds = min(len(known[x].best) for x in (ultra, twin))
    tried = min(len(known[x].tried) for x in (ultra, twin))
    words.append(
      f"`{ultra}` {known[ultra].mean:.3f}, its best twin `{twin}` "
      f"{known[twin].mean:.3f}: a lead of **{lead:+.3f}** bits per byte "
      f"({_count(seeds, 'seed')}, {_count(tried, 'pair')} of rates)."
    )
  if not words:
    return "No two models that answer it are trained as yet."
  return f"At {setting.describe()} {' '.join(words)}"


def _count(number: int, noun: str) -> str:
  return f"{number} {noun}{'' if number == 1 else 's'}"


STUDY = Study(entries, table, plot)
