"""UltraMem's lead over its best twin, by the size and the training length."""

import math
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.harness import page, plots
from benchmarks.studies import study
from benchmarks.studies.plan import UNTUNED, Entry, Outcome
from benchmarks.studies.setting import Setting
from benchmarks.studies.store import Store
from benchmarks.studies.study import Study

SIZES = ("s", "m", "l", "xl")
LENGTHS = (1, 2, 4)
# As published, and in the form that is the best for bytes at size s.
FORMS = ("ultramem", "ultramem, softmax, conv before the MLP")
TWINS = ("dense, conv", "moe 2 of 8, conv", "moe 8 of 32, conv", "pkm, conv")
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
  """Returns the models of every setting, the cheapest training first."""
  return [
    Entry(setting, model)
    for setting in settings(size)
    for model in (*FORMS, *TWINS)
  ]


class Lead(NamedTuple):
  """A form of UltraMem beside its best twin.

  setting: where both were trained.
  form: the name of UltraMem's form.
  ultra: what is known of it.
  twin_name, twin: of the best of `TWINS`.
  """

  setting: Setting
  form: str
  ultra: Outcome
  twin_name: str
  twin: Outcome

  @property
  def tokens_per_parameter(self) -> float:
    return self.ultra.best[0]["tokens_per_parameter"]

  @property
  def value(self) -> float:
    """By how many bits per byte it is better, for the seeds of both."""
    return study.difference(self.twin, self.ultra)


def leads(store: Store, size: str) -> list[Lead]:
  """Returns all that are known: settings from cheap to dear, in two forms."""
  found = []
  for setting in settings(size):
    forms, twins = (
      study.outcomes(store, setting, names, STUDY.is_tuned)
      for names in (FORMS, TWINS)
    )
    if twins:
      best = min(twins, key=lambda x: twins[x].mean)
      found += [
        Lead(setting, form, ultra, best, twins[best])
        for form, ultra in forms.items()
      ]
  return found


def table(store: Store, size: str) -> str:
  rows = [
    [
      str(x.setting.shape.embed_dim),
      f"{x.setting.tokens:,}",
      study.number(x.tokens_per_parameter, ".2f"),
      f"`{x.form}`",
      study.number(x.ultra.mean),
      study.spread(x.ultra),
      f"`{x.twin_name}`",
      study.number(x.twin.mean),
      study.spread(x.twin),
      study.number(x.value, "+.3f"),
    ]
    for x in leads(store, size)
  ]
  header = (
    "D",
    "tokens",
    "tokens per parameter",
    "form",
    "its loss",
    "range (seeds)",
    "best twin",
    "its loss",
    "range (seeds)",
    "lead",
  )
  return page.table(header, rows)


def plot(store: Store, size: str) -> Figure | None:
  """Draws leads against tokens per parameter, with a line through each form."""
  found = leads(store, size)
  if not found:
    return None
  first = found[0].ultra.best[0]
  figure, panels = plots.figure(
    "UltraMem's lead over its best twin with the same convolution",
    first,
    panels=len(FORMS),
    sharey=True,
  )
  for form, axes in zip(FORMS, panels, strict=True):
    of_form = [x for x in found if x.form == form]
    _draw_form(axes, of_form)
    axes.set_title(form, loc="left", size=10)
  panels[0].set_ylabel("lead, bits per byte")
  return figure


def _draw_form(axes: Axes, found: list[Lead]) -> None:
  for width in sorted({x.setting.shape.embed_dim for x in found}):
    points = [
      (x.tokens_per_parameter, x.value)
      for x in found
      if x.setting.shape.embed_dim == width
    ]
    axes.plot(*zip(*points, strict=True), marker="o", label=f"D = {width}")
  if len(found) > 2:
    x = np.array([math.log(x.tokens_per_parameter) for x in found])
    slope, start = np.polyfit(x, [x.value for x in found], 1)
    ends = np.array([x.min(), math.log(PAPER)])
    axes.plot(np.exp(ends), start + slope * ends, "--", color="0.5")
    axes.axvline(PAPER, color="0.8")
  axes.axhline(0, color="0.3", lw=0.8)
  axes.set_xscale("log")
  axes.set_xlabel("tokens per parameter (151M of the paper: 493)")
  if found:
    axes.legend()


STUDY = Study(entries, table, plot, UNTUNED)
