"""The seconds of a step of models that take turns on one machine.

Those of a cell depend on what else the machine did when it was trained. Here
all models of a setting share every disturbance.
"""

import os
import pathlib
from collections.abc import Sequence

from benchmarks.harness import report, timing, train_steps
from benchmarks.studies import files
from benchmarks.studies.cell import Cell
from benchmarks.studies.store import Record

ROUNDS = 10


def measure(cells: Sequence[Cell], folder: pathlib.Path) -> Record:
  """Returns the record of the times of a setting.

  Args:
    cells: one for each model, all of one setting.
    folder: as `files.resolve` takes it.
  """
  load = os.getloadavg()[0]
  steppers = {
    cell.model: train_steps.stepper(files.resolve(cell.config(), folder))[0]
    for cell in cells
  }
  return {
    "name": f"{cells[0].setting}, times",
    "setting": cells[0].setting,
    "step_seconds": timing.interleaved_seconds(steppers, ROUNDS),
    "load": [load, os.getloadavg()[0]],
    "machine": report.machine(),
    "commit": report.commit(),
  }
