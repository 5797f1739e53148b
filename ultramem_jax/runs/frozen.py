"""Parameters that a run does not train, saved once beside its checkpoints.

A store, `frozen/<number>` in the workdir, is a directory like that of a step,
sealed before any checkpoint refers to it. A checkpoint then holds the other
parameters, and names the store and the digest of its seal; who reads it reads
both. A run makes another store when other parameters are frozen from then on,
and deletes those that no checkpoint refers to.

The checkpoints that refer to a damaged store are lost with it, but they are not
damaged themselves, and stay where they are: a copy of the store mends them.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from absl import logging
from flax import traverse_util

from ultramem_jax.runs import step_dirs
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.runs.step_dirs import Damaged
from ultramem_jax.settings.errors import CheckpointError

FOLDER = "frozen"
ITEM = "params"  # of a checkpoint, of which the stores hold a part


class FrozenError(CheckpointError):
  """The frozen parameters that a checkpoint refers to are damaged."""


class Store(NamedTuple):
  """A store of frozen parameters, as a checkpoint names it.

  path: the directory.
  seal: the digest of its seal.
  """

  path: pathlib.Path
  seal: str

  def facts(self) -> dict[str, Any]:
    """Returns what a checkpoint keeps of the store, for `of`."""
    return {"number": int(self.path.name), "seal": self.seal}

  def arrays(self) -> dict[str, str]:
    """Returns the arrays that it holds, as `step_reader.arrays` does.

    Raises:
      FrozenError: it is damaged.
    """
    try:
      return step_dirs.facts(self.path)["arrays"]
    except Damaged as damage:
      raise self._lost(damage) from damage

  def verify(self) -> None:
    """Requires the files to be those that were saved.

    Raises:
      FrozenError: they are not.
      OSError: one cannot be read now.
    """
    try:
      if not step_dirs.verify(self.path):
        raise Damaged(f"{step_dirs.SEAL} is missing")
      if step_dirs.digest(self.path / step_dirs.SEAL) != self.seal:
        raise Damaged(f"{step_dirs.SEAL} is of other parameters")
    except Damaged as damage:
      raise self._lost(damage) from damage

  def _lost(self, damage: Damaged) -> FrozenError:
    return FrozenError(
      f"{self.path}, the frozen parameters of these checkpoints, is damaged "
      f"({damage}): put back a copy; they are those of the run's init_from, if "
      "it has one"
    )


def root(workdir: pathlib.Path) -> pathlib.Path:
  """Returns the folder of a workdir's stores."""
  return workdir / FOLDER


def next_number(workdir: pathlib.Path) -> int:
  """Returns the number of a new store."""
  return max(workdir_lib.saved_steps(root(workdir)), default=0) + 1


def store_of(step: pathlib.Path) -> Store | None:
  """Returns the store that a saved step refers to, if any.

  Args:
    step: its directory, which may have been set aside.
  Raises:
    Damaged, OSError: as `step_dirs.facts`.
  """
  held = step_dirs.facts_of_any(step).get("frozen")
  if held is None:
    return None
  try:
    number, seal = int(held["number"]), str(held["seal"])
  except (TypeError, KeyError, ValueError) as error:
    raise Damaged(f"{step_dirs.FACTS} names no frozen parameters") from error
  return Store(root(step.parent.parent) / str(number), seal)


def without(items: dict[str, Any], arrays: Mapping[str, str]) -> dict[str, Any]:
  """Returns the items of a step without the arrays that a store holds."""
  flat = traverse_util.flatten_dict(items.get(ITEM, {}), sep="/")
  rest = {k: x for k, x in flat.items() if f"{ITEM}/{k}" not in arrays}
  return {**items, ITEM: traverse_util.unflatten_dict(rest, sep="/")}


def prune(workdir: pathlib.Path, used: Store | None) -> None:
  """Deletes the stores that no checkpoint refers to, set aside or not.

  Nothing is deleted while a checkpoint does not say which it refers to.

  Args:
    workdir: the run's.
    used: stays, too.
  """
  numbers = set(workdir_lib.saved_steps(root(workdir)))
  if used:
    numbers -= {int(used.path.name)}
  if not numbers:
    return
  try:
    kept = {
      store_of(path)
      for path in (workdir / workdir_lib.CHECKPOINTS_NAME).iterdir()
      if path.name.isdecimal() or path.name.startswith("corrupt-")
    }
    numbers -= {int(store.path.name) for store in kept if store}
    for number in numbers:
      step_dirs.remove(root(workdir) / str(number))
  except (Damaged, OSError) as error:
    logging.warning("unused frozen parameters are not deleted: %s", error)
