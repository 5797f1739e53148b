"""The records of cells and of times: a file of JSON lines that only grows.

All studies share it, so that a cell that two of them need is trained once. A
cell is written when it is done: of a killed study, the one at hand is lost.
"""

import json
import pathlib
from typing import Any

from benchmarks.studies.cell import Cell

Record = dict[str, Any]


class Store:
  """Records by name.

  Args:
    path: of the file; made with the first record. Of two records of a name
      the later one counts. A line without an end, as a kill may leave it, is
      dropped.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    text = path.read_text() if path.exists() else ""
    whole, end, partial = text.rpartition("\n")
    if partial:
      path.write_text(whole + end)
    records = [json.loads(line) for line in whole.splitlines()]
    self._records = {record["name"]: record for record in records}

  def cells(self) -> list[Record]:
    """Returns the records of all cells."""
    return [x for x in self._records.values() if "key" in x]

  def times(self, setting: str) -> Record | None:
    """Returns the record of `times.measure` for a setting."""
    return self._records.get(f"{setting}, times")

  def get(self, cell: Cell) -> Record | None:
    """Returns the record of a cell; None: there is none, or of other settings.

    A cell whose definition has changed has its old name and another key.
    """
    record = self._records.get(cell.name)
    return record if record and record["key"] == cell.key else None

  def add(self, record: Record) -> None:
    """Appends a record."""
    self._path.parent.mkdir(parents=True, exist_ok=True)
    with open(self._path, "a") as f:
      f.write(json.dumps(record) + "\n")
    self._records[record["name"]] = record
