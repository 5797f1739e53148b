"""The tables of the comparison, in Markdown."""

import statistics
from collections.abc import Iterable
from typing import Any

from benchmarks.facts import capacity
from benchmarks.facts.general import TEXTS
from benchmarks.facts.methods import METHODS
from benchmarks.harness import page, report

PAGE = report.ROOT / "docs" / "facts-compared.md"
MODELS = ("smollm2", "small")  # that the page is about

Record = dict[str, Any]


def percent(shares: Iterable[float]) -> str:
  """Returns the mean of shares, and the least and the largest of several."""
  values = [100 * share for share in shares]
  text = f"{statistics.mean(values):.0f} %"
  if len(values) > 1:
    text += f" ({min(values):.0f} to {max(values):.0f})"
  return text


def tax(record: Record, untouched: Record) -> float:
  """Returns how much higher perplexity is, as the geometric mean of texts."""
  ratios = [
    record["perplexity"][text] / untouched["perplexity"][text] for text in TEXTS
  ]
  return statistics.geometric_mean(ratios) - 1


def last(record: Record) -> Record:
  """Returns what was found when all was learned."""
  return record["history"][-1] if "history" in record else record


def line(record: Record) -> str:
  """Returns what a cell has shown, in a line."""
  if "bytes" in record:
    held = record["bytes"] / 1e9
    return f"  {record['step_seconds']:.2f} s a step, {held:.2f} GB"
  found = last(record)
  recalls = [
    f"{name} set " * (name != "all") + f"{kind} {100 * share:.0f} %"
    for name, shares in found["recall"].items()
    for kind, share in shares.items()
  ]
  harm = [f"{text} {x:.2f}" for text, x in found["perplexity"].items()]
  return f"  {', '.join(recalls)}; perplexity: {', '.join(harm)}"


def taxes(group: list[Record], records: list[Record]) -> list[float]:
  """Returns `tax` of each record of a model.

  Args:
    group: the records.
    records: of all cells; if the untouched model is not among them, there is
      nothing to compare with, and the list is empty.
  """
  untouched = [
    record
    for record in records
    if record["method"] == "untouched" and record["model"] == group[0]["model"]
  ]
  return [tax(last(record), one) for record in group for one in untouched[:1]]


def _harm(group: list[Record], records: list[Record]) -> str:
  """Returns the mean of `taxes` as a column of a table."""
  found = taxes(group, records)
  return f"{100 * statistics.mean(found):+.1f} %" if found else ""


def _known(group: list[Record]) -> str:
  """Returns how many capitals are known at last, by the seeds asked."""
  found = [x["known"] for x in map(last, group) if "known" in x]
  return percent(found) if found else ""


def groups(records: list[Record], part: str) -> dict[tuple, list[Record]]:
  """Returns the records of a part that differ in the seed only."""
  found = {}
  for record in records:
    if record["part"] == part and record["method"] != "untouched":
      names = ("model", "facts", "method", "rate", "steps", "rows", "sets")
      key = tuple(record.get(name, 0) for name in names)
      found.setdefault(key, []).append(record)
  return found


def best(records: list[Record], part: str) -> dict[tuple, list[Record]]:
  """Returns the groups of each method's best rate: by seen and unseen recall.

  Where two recall the same, the one with less harm is better.
  """

  def quality(group):
    found = [last(record) for record in group]
    recalls = [
      statistics.mean(one["recall"]["all"][kind] for kind in ("seen", "unseen"))
      for one in found
    ]
    harm = [
      statistics.geometric_mean(one["perplexity"].values()) for one in found
    ]
    return round(statistics.mean(recalls), 2), -statistics.mean(harm)

  chosen = {}
  for key, group in groups(records, part).items():
    model, facts, method, _, _, rows, sets = key
    place = (model, facts, method, rows, sets)
    if place not in chosen or quality(group) > quality(chosen[place]):
      chosen[place] = group
  return chosen


def _by_method(found: dict[tuple, list[Record]]) -> list[list[Record]]:
  """Returns groups in the order of the methods, then of steps and rates."""
  order = list(METHODS)

  def place(group):
    one = group[0]
    return order.index(one["method"]), one["steps"], one["rate"]

  return sorted(found.values(), key=place)


def _method(record: Record) -> str:
  name = record["method"]
  return f"{METHODS[name].label} (`{name}`)"


def recall_table(records: list[Record]) -> str:
  """Returns the table of the part "recall": a row for each rate and length."""
  rows = []
  for record in records:
    if record["method"] == "untouched":
      told = [percent([x]) for x in record["recall"]["all"].values()]
      rows.append(["untouched", "", "0", "1", *told, "", _known([record])])
  for group in _by_method(groups(records, "recall")):
    one, found = group[0], [record["recall"]["all"] for record in group]
    kinds = ("seen", "unseen", "two_hop")
    rows.append(
      [
        *(_method(one), f"{one['rate']:g}", str(one["steps"]), str(len(group))),
        *(percent(x[kind] for x in found if kind in x) for kind in kinds),
        *(_harm(group, records), _known(group)),
      ]
    )
  header = "method, rate, steps, seeds, seen, unseen, two facts, perplexity"
  return page.table([*header.split(", "), "capitals"], rows)


def continual_table(records: list[Record]) -> str:
  """Returns the table of the part "continual": a row for each rate."""
  rows = []
  for group in _by_method(groups(records, "continual")):
    one = group[0]
    first, end = ([r["history"][i]["recall"] for r in group] for i in (0, -1))
    rows.append(
      [
        *(_method(one), f"{one['rate']:g}", str(one["steps"]), str(len(group))),
        f"{len(one['history'])} of {one['facts']}",
        percent(x["first"]["seen"] for x in first),
        percent(x["first"]["seen"] for x in end),
        percent(x["newest"]["seen"] for x in end),
        percent(x["all"]["seen"] for x in end),
        percent(x["all"]["unseen"] for x in end),
        *(_harm(group, records), _known(group)),
        f"{one['reads_alike']:.3f}" if "reads_alike" in one else "",
      ]
    )
  header = (
    *("method", "rate", "steps a set", "seeds", "sets"),
    *("first set, at first", "first set, at last", "last set", "all sets"),
    *("all, unseen", "perplexity", "capitals", "reads alike"),
  )
  return page.table(header, rows)


def capacity_table(records: list[Record]) -> str:
  """Returns the table of the part "capacity": recall by rows and facts."""
  found = capacity.groups(records)
  loads = sorted({facts for group in found.values() for facts in group})
  rows = []
  for key, group in sorted(found.items()):
    one, facts = next(iter(group.values())), capacity.stored(group)
    recalls = [group[x]["recall"]["all"] if x in group else {} for x in loads]
    rows.append(
      [
        *(_method(one), f"{one['rate']:g}", f"{key[-1]:g}", f"{one['rows']:,}"),
        *(
          f"{percent([x['seen']])} / {percent([x['unseen']])}" if x else ""
          for x in recalls
        ),
        "at least " * (not capacity.is_full(group)) + f"{facts:,}",
        f"{one['table_bytes'] / facts:,.0f}" if facts else "",
        _harm([group[facts]], records) if facts else "",
      ]
    )
  header = ["method", "rate", "steps a fact", "rows"]
  header += [f"{x:,} facts" for x in loads]
  return page.table([*header, "stored", "bytes a fact", "perplexity"], rows)


def cost_table(records: list[Record]) -> str:
  """Returns the table of the part "cost"."""
  rows = [
    [
      _method(record),
      f"{1e3 * record['step_seconds']:.0f}",
      f"{record['bytes'] / 1e9:.2f}",
    ]
    for record in records
    if record["part"] == "cost"
  ]
  return page.table(("method", "ms a step", "GB"), rows)


# By part.
TABLES = {
  "recall": recall_table,
  "continual": continual_table,
  "capacity": capacity_table,
  "cost": cost_table,
}


def blocks(records: list[Record], models: Iterable[str]) -> dict[str, str]:
  """Returns the text of each block of the page, PART_MODEL, by name."""
  return {
    f"{part}_{model}": table([x for x in records if x["model"] == model])
    or f"{part.capitalize()}: nothing has been measured yet."
    for part, table in TABLES.items()
    for model in models
  }
