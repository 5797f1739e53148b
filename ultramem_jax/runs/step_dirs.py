"""The directories of saved steps: which exist, are sound, and are kept.

Orbax restores bytes that a disk or a copy has changed without noticing, so
every committed step is sealed: its `sha256.json` holds the files' digests.
"""

import hashlib
import json
import math
import os
import pathlib
import shutil
from typing import Any

from orbax.checkpoint import v1 as ocp

from ultramem_jax.runs import workdir as workdir_lib

SEAL = "sha256.json"


def committed(root: pathlib.Path) -> list[int]:
  """Returns the committed steps, ascending."""
  if not root.is_dir():
    return []
  return sorted(
    int(path.name)
    for path in root.iterdir()
    if path.name.isdecimal() and path.is_dir()
  )


def _digest(path: pathlib.Path) -> str:
  with open(path, "rb") as f:
    return hashlib.file_digest(f, "sha256").hexdigest()


def seal(path: pathlib.Path) -> None:
  """Records the digest of every file of a committed step."""
  digests = {
    str(file.relative_to(path)): _digest(file)
    for file in sorted(path.rglob("*"))
    if file.is_file()
  }
  workdir_lib.write_atomically(path / SEAL, json.dumps(digests).encode())


def verify(path: pathlib.Path) -> tuple[bool, str]:
  """Returns whether a step is sealed, and its damage ("" if it has none)."""
  manifest = path / SEAL
  if not manifest.exists():
    return False, ""
  try:
    for name, digest in json.loads(manifest.read_bytes()).items():
      if _digest(path / name) != digest:
        return True, f"{name} has changed"
  except FileNotFoundError as error:
    return True, f"{os.path.relpath(error.filename, path)} is missing"
  except (OSError, ValueError, AttributeError) as error:
    return True, f"{type(error).__name__}: {error}"
  return True, ""


def set_aside(path: pathlib.Path) -> pathlib.Path:
  """Renames a damaged step to corrupt-<step>, with a suffix if that exists."""
  aside = path.with_name(f"corrupt-{path.name}")
  count = 1
  while aside.exists():
    count += 1
    aside = path.with_name(f"corrupt-{path.name}-{count}")
  return path.rename(aside)


def _valid_loss(path: pathlib.Path) -> float:
  """Returns the validation loss of a step, infinity if it is unknown."""
  try:
    facts: Any = ocp.checkpointables_metadata(str(path)).custom_metadata
    loss = facts["valid_loss"]
  except Exception:  # a damaged step; restoring it will report the damage
    return math.inf
  return math.inf if loss is None else loss


def best(root: pathlib.Path) -> int | None:
  """Returns the step with the least validation loss, the last of equal ones."""
  losses = {step: _valid_loss(root / str(step)) for step in committed(root)}
  known = [step for step, loss in losses.items() if loss < math.inf]
  return min(known, key=lambda step: (losses[step], -step), default=None)


def prune(root: pathlib.Path, keep: int) -> None:
  """Deletes all steps except the newest `keep` and the best."""
  best_step = best(root)
  for step in committed(root)[:-keep]:
    if step != best_step:
      # Renamed first, so that a kill leaves no half-deleted step.
      doomed = root / f"{step}.deleting"
      os.rename(root / str(step), doomed)
      shutil.rmtree(doomed)
