"""Capacity: how many facts a table stores, of those that are taught at once.

Sets double until a table does not hold one of them. All facts are repeated
alike: the steps grow with the set.
"""

from collections.abc import Iterable
from typing import Any

from benchmarks.facts.methods import METHODS
from benchmarks.facts.store import Cell

TABLES = (16_384, 65_536, 262_144, 1_048_576)  # rows
LOADS = (100, 200, 400, 800, 1600, 3200, 6400)  # facts of a set
# The least recall, in phrases seen in training, of a set that is stored.
STORED = 0.9

Record = dict[str, Any]


def cells(cell: Cell) -> list[Cell]:
  """Returns cells of larger sets in larger tables, smallest sets first.

  Args:
    cell: its steps are those of the smallest set.
  """
  if METHODS[cell.method].memory is None:
    return []
  return [
    cell._replace(facts=facts, steps=cell.steps * facts // LOADS[0], rows=rows)
    for facts in LOADS
    for rows in TABLES
  ]


def is_beyond(cell: Cell, records: Iterable[Record]) -> bool:
  """Returns whether a smaller set was too large for the table of a cell."""
  group = groups(records).get(_key(cell._asdict()), {})
  return any(
    facts < cell.facts and not _is_stored(one) for facts, one in group.items()
  )


def groups(records: Iterable[Record]) -> dict[tuple, dict[int, Record]]:
  """Returns the records of each table, by the facts of the set."""
  found = {}
  for record in records:
    if record["part"] == "capacity":
      found.setdefault(_key(record), {})[record["facts"]] = record
  return {key: dict(sorted(group.items())) for key, group in found.items()}


def stored(group: dict[int, Record]) -> int:
  """Returns the facts of the largest set that a table has stored; 0: none."""
  return max((n for n, one in group.items() if _is_stored(one)), default=0)


def is_full(group: dict[int, Record]) -> bool:
  """Returns whether a set was tried that a table did not store."""
  return not all(map(_is_stored, group.values()))


def _key(fields: Record) -> tuple:
  """Returns what the cells of a table have in common."""
  names = ("model", "method", "rate", "seed", "rows")
  return *(fields[x] for x in names), fields["steps"] / fields["facts"]


def _is_stored(record: Record) -> bool:
  return record["recall"]["all"]["seen"] >= STORED
