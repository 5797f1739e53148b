"""The directories of saved steps: which exist, are sound, and are kept.

Orbax restores bytes that a disk or a copy has changed without noticing, so
every committed step is sealed: its `sha256.json` holds the files' digests. The
only file that may come later is `valid_loss.json`.

Damage is a digest that differs, a file that is missing or that the seal does
not know, or a broken seal; it is raised as `Damaged`. Whatever else keeps a
file from being read says nothing about the checkpoint, and stays the OSError
that it is.
"""

import contextlib
import hashlib
import json
import math
import os
import pathlib
import shutil
from typing import Any

from absl import logging

from ultramem_jax.runs import files
from ultramem_jax.runs import workdir as workdir_lib

SEAL = "sha256.json"
LOSS = "valid_loss.json"
# Orbax's file that holds, with other facts, those given to it.
FACTS = "_CHECKPOINT_METADATA"


class Damaged(Exception):
  """A checkpoint whose bytes were lost or changed."""


def _files(path: pathlib.Path) -> dict[str, pathlib.Path]:
  """Returns the files that a seal covers, by name.

  Hidden files are none of Orbax: file systems make some, and kills leave some.
  """
  return {
    str(file.relative_to(path)): file
    for file in sorted(path.rglob("*"))
    if file.name not in (SEAL, LOSS) and not file.name.startswith(".")
    if file.is_file()
  }


def digest(path: pathlib.Path) -> str:
  """Returns the sha256 of a file."""
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def is_sealed(path: pathlib.Path) -> bool:
  """Returns whether a step has a seal; `verify` tells whether it holds."""
  return (path / SEAL).exists()


def seal(path: pathlib.Path) -> None:
  """Forces a committed step to the disk, and records every file's digest."""
  files.sync_tree(path)
  files.sync_folder(path.parent)
  digests = {name: digest(file) for name, file in _files(path).items()}
  files.write_atomically(path / SEAL, json.dumps(digests).encode())


def verify(path: pathlib.Path) -> bool:
  """Returns whether a step is sealed.

  Raises:
    Damaged: it is, and its files are not those that were sealed.
    OSError: a file cannot be read now.
  """
  try:
    sealed = _parse((path / SEAL).read_bytes(), SEAL)
  except (FileNotFoundError, NotADirectoryError):
    return False
  except IsADirectoryError as error:
    raise Damaged(f"{SEAL} is a folder") from error
  try:
    for name in _files(path):
      if name not in sealed:
        raise Damaged(f"{SEAL} does not know {name}")
    for name, held in sealed.items():
      if digest(path / name) != held:
        raise Damaged(f"{name} has changed")
  except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
    name = os.path.relpath(error.filename, path)
    raise Damaged(f"{name} is missing") from error
  return True


def facts(path: pathlib.Path) -> dict[str, Any]:
  """Returns what was saved besides the arrays of a step.

  Raises:
    Damaged: it is lost, or belongs to another step.
    OSError: it cannot be read now.
  """
  held = facts_of_any(path)
  step = held.get("step", int(path.name))
  if step != int(path.name):
    raise Damaged(f"it is a copy of step {step}")
  return held


def facts_of_any(path: pathlib.Path) -> dict[str, Any]:
  """Returns `facts` of a step that may have been set aside.

  Raises:
    Damaged, OSError: as `facts`.
  """
  try:
    held = _parse((path / FACTS).read_bytes(), FACTS).get("custom_metadata")
  except (FileNotFoundError, NotADirectoryError) as error:
    raise Damaged(f"{FACTS} is missing") from error
  if not isinstance(held, dict) or not all(
    isinstance(held.get(name), dict) for name in ("arrays", "data")
  ):
    raise Damaged(f"{FACTS} lacks what belongs to a step")
  return held


def _parse(content: bytes, name: str) -> dict[str, Any]:
  try:
    held = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise Damaged(f"{name}: {type(error).__name__}: {error}") from error
  if not isinstance(held, dict):
    raise Damaged(f"{name} holds no names")
  return held


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a damaged step to corrupt-<step>, with a suffix if that exists."""
  aside = path.with_name(f"corrupt-{path.name}")
  count = 1
  while aside.exists():
    count += 1
    aside = path.with_name(f"corrupt-{path.name}-{count}")
  return path.rename(aside)


def add_loss(path: pathlib.Path, loss: float | None) -> None:
  """Adds a validation loss to a step that was saved without."""
  files.write_atomically(path / LOSS, json.dumps(loss).encode())


def valid_loss(path: pathlib.Path) -> tuple[float | None, bool]:
  """Returns the validation loss of a step, and whether it is still due.

  The loss is None if it is unknown, or not finite.

  Raises:
    Damaged, OSError: as `facts`.
  """
  held = facts(path)
  try:
    loss, due = json.loads((path / LOSS).read_bytes()), False
  except FileNotFoundError:
    loss, due = held.get("valid_loss"), bool(held.get("validation_due"))
  except (ValueError, RecursionError) as error:
    raise Damaged(f"{LOSS}: {error}") from error
  known = isinstance(loss, float) and math.isfinite(loss)
  return (loss if known else None), due


def _losses(root: pathlib.Path) -> dict[int, float]:
  """Returns the validation loss of every step, infinity if it has none.

  Damaged steps are left out; restoring one reports the damage.
  """
  losses = {}
  for step in workdir_lib.saved_steps(root):
    with contextlib.suppress(Damaged):
      loss, _ = valid_loss(root / str(step))
      losses[step] = math.inf if loss is None else loss
  return losses


def _best(losses: dict[int, float]) -> int | None:
  known = [step for step, loss in losses.items() if loss < math.inf]
  return min(known, key=lambda step: (losses[step], -step), default=None)


def best(root: pathlib.Path) -> int | None:
  """Returns the step with the least validation loss, the last of equal ones.

  Raises:
    OSError: a loss cannot be read now.
  """
  return _best(_losses(root))


def prune(root: pathlib.Path, newest: int, keep: int) -> None:
  """Deletes the steps up to `newest`, except the last `keep` and the best.

  Steps after it are of another run, and damaged ones may be worth a look: they
  stay. So does, with a warning, what cannot be deleted now.
  """
  try:
    losses = _losses(root)
    for step in [step for step in losses if step <= newest][:-keep]:
      if step != _best(losses):
        remove(root / str(step))
  except OSError as error:
    logging.warning("older checkpoints are not deleted: %s", error)


def remove(path: pathlib.Path) -> None:
  """Deletes a step.

  A kill leaves the whole step, or a folder that `delete_leftovers` deletes.
  """
  doomed = path.with_name(f"{path.name}.deleting")
  os.rename(path, doomed)
  delete(doomed)


def delete(path: pathlib.Path) -> None:
  """Deletes a directory, or what else has its name; a link's target stays."""
  if path.is_dir() and not path.is_symlink():
    shutil.rmtree(path)
  else:
    path.unlink()


def delete_leftovers(root: pathlib.Path) -> None:
  """Deletes what kills left of saves and deletions."""
  for pattern in ("*.orbax-checkpoint-tmp*", "*.deleting"):
    for leftover in root.glob(pattern):
      if leftover.name.partition(".")[0].isdecimal():
        try:
          delete(leftover)
        except OSError as error:
          logging.warning("%s is not deleted: %s", leftover, error)
