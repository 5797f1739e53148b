"""UltraMem's lead over its best twin, by the size and the training length."""

import math

import numpy as np
from matplotlib.figure import Figure

from benchmarks.harness import plots
from benchmarks.studies import study
from benchmarks.studies.plan import UNTUNED, Entry, Outcome
from benchmarks.studies.setting import Setting
from benchmarks.studies.store import Store
from benchmarks.studies.study import Study

SIZES = ("s", "m", "l", "xl")
LENGTHS = (1, 2, 4)
TWINS = ("dense, conv", "moe 2 of 8, conv", "pkm, conv")
# Tokens per dense and sparse parameter of 151m_x12: 1T for 2.03 B.
PAPER = 1e12 / 2.03e9


def settings(size: str) -> list[Setting]:
  """Returns all that are compared; of the sizes only xs stands by itself."""
  sizes = ("xs",) if size == "xs" else SIZES
  return sorted(
    (Setting(x, length=length) for x in sizes for length in LENGTHS),
    key=lambda x: x.tokens * x.shape.flops,
  )


def entries(size: str) -> list[Entry]:
  """The models of every setting, the cheapest training first."""
  return [
    Entry(setting, model)
    for setting in settings(size)
    for model in ("ultramem", *TWINS)
  ]


def lead(store: Store, setting: Setting) -> tuple[Outcome, str, Outcome] | None:
  """Returns UltraMem, the name of its best twin, and that twin."""
  found = study.outcomes(
    store, setting, ["ultramem", *TWINS], is_tuned=STUDY.is_tuned
  )
  ultra = found.pop("ultramem", None)
  if not ultra or not found:
    return None
  name = min(found, key=lambda x: found[x].mean)
  return ultra, name, found[name]


def _leads(store: Store, size: str):
  pairs = ((x, lead(store, x)) for x in settings(size))
  return [(x, found) for x, found in pairs if found]


def table(store: Store, size: str) -> str:
  rows = [
    [
      str(setting.shape.embed_dim),
      f"{setting.tokens:,}",
      study.number(ultra.best[0]["tokens_per_parameter"], ".2f"),
      study.number(ultra.mean),
      study.spread(ultra),
      f"`{name}`",
      study.number(twin.mean),
      study.spread(twin),
      study.number(study.difference(twin, ultra), "+.3f"),
    ]
    for setting, (ultra, name, twin) in _leads(store, size)
  ]
  header = (
    "D",
    "tokens",
    "tokens per parameter",
    "`ultramem`",
    "range (seeds)",
    "best twin",
    "its loss",
    "range (seeds)",
    "lead",
  )
  return study.markdown(header, rows)


def plot(store: Store, size: str) -> Figure | None:
  """Draws leads against tokens per parameter, with a line through them."""
  leads = _leads(store, size)
  if not leads:
    return None
  first = leads[0][1][0].best[0]
  figure, (axes,) = plots.figure(
    "UltraMem's lead over its best twin with the same convolution", first
  )
  points = []
  for width in sorted({x.shape.embed_dim for x, _ in leads}):
    of_width = [
      (ultra.best[0]["tokens_per_parameter"], study.difference(twin, ultra))
      for setting, (ultra, _, twin) in leads
      if setting.shape.embed_dim == width
    ]
    points += of_width
    axes.plot(*zip(*of_width, strict=True), marker="o", label=f"D = {width}")
  if len(points) > 2:
    x = np.array([math.log(tokens) for tokens, _ in points])
    slope, start = np.polyfit(x, [y for _, y in points], 1)
    ends = np.array([x.min(), math.log(PAPER)])
    axes.plot(np.exp(ends), start + slope * ends, "--", color="0.5")
    axes.axvline(PAPER, color="0.8")
  axes.axhline(0, color="0.3", lw=0.8)
  axes.set_xscale("log")
  axes.set(
    xlabel="tokens per parameter (151M of the paper: 493)",
    ylabel="lead, bits per byte",
  )
  axes.legend()
  return figure


STUDY = Study(entries, table, plot, UNTUNED)
