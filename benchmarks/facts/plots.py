"""The plots of the comparison."""

import statistics
from typing import Any

from matplotlib import colormaps, ticker
from matplotlib.figure import Figure

from benchmarks.facts import capacity as capacity_lib
from benchmarks.facts import tables
from benchmarks.facts.methods import METHODS
from benchmarks.harness import plots


def recall(result: dict[str, Any], model: str) -> Figure:
  """Draws recall in unseen templates against what it costs, a point a run.

  Args:
    result: of `Store.result`; without the untouched model's cell there is
      no point to draw.
    model: whose cells are drawn.
  """
  records = [x for x in result["cells"].values() if x["model"] == model]
  figure, (axes,) = plots.figure(
    f"{model}: recall in unseen phrases, and what general text pays",
    result,
    size=(8, 5),
  )
  found = tables.groups(records, "recall")
  usual = statistics.mode(key[4] for key in found) if found else 0
  for key, group in found.items():
    method = METHODS[key[2]]
    harm = [100 * share for share in tables.taxes(group, records)]
    if not harm:
      continue
    told = [100 * x["recall"]["all"]["unseen"] for x in group]
    color = plots.ORANGE if method.memory is None else plots.BLUE
    axes.scatter(harm, told, color=color, s=18)
    place = statistics.mean(harm), statistics.mean(told)
    label = f"{key[2]} {key[3]:g}" + f", {key[4]} steps" * (key[4] != usual)
    axes.annotate(label, place, (6, -2), textcoords="offset points", fontsize=6)
  for color, kind in ((plots.BLUE, "with a memory"), (plots.ORANGE, "without")):
    axes.scatter([], [], color=color, s=18, label=f"{kind}: method, rate")
  axes.legend(fontsize=7, loc="center right")
  axes.set_xscale("symlog", linthresh=10)
  axes.xaxis.set_major_formatter("{x:+.0f}")
  axes.margins(x=0.15)
  axes.set(
    xlabel="perplexity of general text above the untouched model's, %",
    ylabel="recall in unseen templates, %",
    ylim=(-3, 103),
  )
  return figure


def continual(result: dict[str, Any], model: str) -> Figure:
  """Draws the recall of the first set as others follow, a line a method."""
  records = [x for x in result["cells"].values() if x["model"] == model]
  figure, (axes,) = plots.figure(
    f"{model}: what is left of the first set of facts", result
  )
  for group in tables.best(records, "continual").values():
    name, facts = group[0]["method"], group[0]["facts"]
    told = [
      100 * statistics.mean(x["recall"]["first"]["seen"] for x in after)
      for after in zip(*(record["history"] for record in group), strict=True)
    ]
    style = "--" if METHODS[name].memory is None else "-"
    label = f"{name}, sets of {facts}"
    axes.plot(range(1, len(told) + 1), told, style, marker=".", label=label)
  axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
  axes.set(
    xlabel="sets learned", ylabel="recall of the first, %", ylim=(-3, 103)
  )
  axes.legend(fontsize=7)
  return figure


def capacity(result: dict[str, Any], model: str) -> Figure:
  """Draws the recall of larger sets, and how many facts each table stores."""
  records = [x for x in result["cells"].values() if x["model"] == model]
  figure, (by_facts, by_rows) = plots.figure(
    f"{model}: facts that are taught at once, and stored", result, panels=2
  )
  found, lines = capacity_lib.groups(records), {}
  shades = colormaps["viridis"].resampled(len(capacity_lib.TABLES) + 1)
  for key, group in sorted(found.items()):
    one = next(iter(group.values()))
    told = [100 * x["recall"]["all"]["seen"] for x in group.values()]
    by_facts.plot(
      list(group),
      told,
      marker=".",
      color=shades(capacity_lib.TABLES.index(one["rows"])),
      label=f"{one['method']}, {one['rows']:,} rows",
    )
    name = f"{one['method']}, {key[-1]:g} steps a fact"
    lines.setdefault(name, {})[one["rows"]] = capacity_lib.stored(group)
    if not capacity_lib.is_full(group):
      place = one["rows"], capacity_lib.stored(group)
      by_rows.annotate("at least", place, (-12, 8), textcoords="offset points")
  for name, line in lines.items():
    by_rows.plot(list(line), list(line.values()), marker="o", label=name)
  by_rows.margins(y=0.2)
  least = 100 * capacity_lib.STORED
  by_facts.axhline(least, color=plots.GREY, linestyle=":")
  plots.log_x(by_facts, [x for group in found.values() for x in group])
  plots.log_x(by_rows, [rows for line in lines.values() for rows in line])
  by_facts.set(xlabel="facts of a set", ylabel="recalled, %", ylim=(-3, 103))
  by_rows.set(
    xlabel="rows of a table",
    ylabel=f"facts of the largest set with {least:.0f} %",
    ylim=(0, None),
  )
  for axes in (by_facts, by_rows):
    axes.legend(fontsize=7)
  return figure


PARTS = {"recall": recall, "continual": continual, "capacity": capacity}
