"""The look of the plots: the finding above, the machine below."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

BLUE, ORANGE, GREEN, GREY = "#1f77b4", "#e8710a", "#2ca02c", "#7f7f7f"
TITLE_CHARACTERS = 9.5  # to an inch
# A model has the same colour in every plot.
MODELS = {"dense": GREY, "MoE": ORANGE, "PKM": GREEN, "UltraMem": BLUE}


def figure(
  finding: str,
  result: dict[str, Any],
  panels: int = 1,
  size: tuple[float, float] = (6.4, 4.2),
  **options: Any,
) -> tuple[Figure, list[Axes]]:
  """Returns an empty figure and its panels, from left to right.

  Args:
    finding: the title, a sentence.
    result: of a benchmark; its "machine" is named below.
    panels: their number.
    size: of one panel, in inches.
    **options: of `Figure.subplots`.
  """
  made = Figure(figsize=(panels * size[0], size[1]), layout="constrained")
  axes = made.subplots(1, panels, squeeze=False, **options)[0]
  title = textwrap.fill(finding, int(TITLE_CHARACTERS * panels * size[0]))
  made.suptitle(title, x=0.01, ha="left", weight="bold", size=12)
  made.supxlabel(
    describe_machine(result["machine"]), x=0.99, ha="right", size=8, color="0.4"
  )
  for panel in axes:
    panel.grid(alpha=0.3)
    panel.set_axisbelow(True)
    panel.spines[["top", "right"]].set_visible(False)
  return made, list(axes)


def describe_machine(machine: dict[str, Any]) -> str:
  """Returns a line about the machine of `report.machine`."""
  devices = machine["devices"]
  cores = machine["cores"]
  place = f"{cores} core{'s' * (cores != 1)} of {machine['processor']}"
  if devices[0] != "cpu":
    place = f"{len(devices)} x {devices[0]}"
  elif len(devices) > 1:
    place = f"{len(devices)} simulated devices"
  return f"{place}, JAX {machine['jax']}"


def log_x(axes: Axes, values: Iterable[float]) -> None:
  """Makes the horizontal axis logarithmic, with a tick at each value."""
  ticks = sorted(set(values))
  axes.set_xscale("log")
  axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
  axes.set_xticks([], minor=True)


def log_y(axes: Axes) -> None:
  """Makes the vertical axis logarithmic, with plain numbers at 1, 2 and 5."""
  axes.set_yscale("log")
  axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
  axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:,.10g}"))
  axes.yaxis.set_minor_formatter(NullFormatter())


def bars(
  axes: Axes,
  values: dict[str, float],
  text: str = "{:.0f}",
  colors: str | Sequence[str] = BLUE,
) -> None:
  """Draws horizontal bars, the first on top, each with its number."""
  drawn = axes.barh(list(values), list(values.values()), color=colors)
  axes.bar_label(drawn, [text.format(v) for v in values.values()], padding=3)
  axes.invert_yaxis()
  axes.margins(x=0.15)
  axes.grid(visible=False)
