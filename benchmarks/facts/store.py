"""The results of the comparison: a record a cell, written as it is measured.

A cell is a method at a rate with a seed in a part of the comparison. A command
that is killed, and started again, goes on with the cells that are missing.
"""

import json
import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

from benchmarks.harness import report
from ultramem_jax.runs.files import write_atomically


class Cell(NamedTuple):
  """What a record measures.

  model: the name of the backbone.
  part, method: of the comparison.
  rate, seed, steps: of the runs.
  facts: of a set.
  rows: of a table, in the part "capacity"; 0: as the method has it.
  sets: in the part "continual", one after the other; 0: there is one.
  """

  model: str
  part: str
  method: str
  rate: float
  seed: int
  steps: int
  facts: int
  rows: int = 0
  sets: int = 0

  @property
  def name(self) -> str:
    """As a file's or a folder's name."""
    rows = f"_{self.rows}" * bool(self.rows)
    sets = f"_{self.sets}_sets" * bool(self.sets)
    return (
      f"{self.model}_{self.part}_{self.method}_{self.rate:g}_{self.seed}_"
      f"{self.steps}_{self.facts}{rows}{sets}"
    )


class Store:
  """The file of the records; see `records`."""

  def __init__(self, path: pathlib.Path):
    self._path, self._cells = path, {}
    self._read()

  def _read(self) -> None:
    if self._path.exists():
      self._cells |= json.loads(self._path.read_text())["cells"]

  def records(self) -> list[dict[str, Any]]:
    """Returns what was measured of each cell, with the fields of `Cell`."""
    return list(self._cells.values())

  def measured(
    self, cell: Cell, measure: Callable[[], dict[str, Any]]
  ) -> dict[str, Any]:
    """Returns the record of a cell; measures and writes it if it is missing."""
    if cell.name not in self._cells:
      self._cells[cell.name] = {
        **cell._asdict(),
        **measure(),
        "machine": report.machine(),
        "commit": report.commit(),
      }
      self._write()
    return self._cells[cell.name]

  def result(self) -> dict[str, Any]:
    """Returns what the file holds: the machine, and the cells by name."""
    return {"machine": report.machine(), "cells": self._cells}

  def _write(self) -> None:
    self._read()  # what another command has measured meanwhile
    self._path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(self.result(), indent=1) + "\n"
    write_atomically(self._path, text.encode())
