"""Reads a saved step, or reports that it is damaged."""

import dataclasses
import os
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.runs import array_reader, distributed, frozen, step_dirs
from ultramem_jax.runs.frozen import FrozenError, Store
from ultramem_jax.runs.step_dirs import Damaged
from ultramem_jax.settings.errors import TargetError, few

# How TensorStore's errors begin where files are missing or hold other bytes.
CONTENT_STATUSES = (
  "DATA_LOSS",
  "FAILED_PRECONDITION",
  "INVALID_ARGUMENT",
  "NOT_FOUND",
  "OUT_OF_RANGE",
)


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint in memory.

  Attributes:
    step: number of optimizer steps done when it was saved.
    items: the requested pytrees, by name.
    data_state: of the data iterator, {lane: state} for all processes' lanes.
    valid_loss: validation loss at that step; None: it was not evaluated, or is
      not finite.
    validation_due: whether it should have been, but the run was stopped.
    frozen: the store of those of its parameters that lie apart.
  """

  step: int
  items: dict[str, Any]
  data_state: dict[str, Any]
  valid_loss: float | None
  validation_due: bool
  frozen: Store | None = None


def arrays(tree: Any) -> dict[str, str]:
  """Describes the leaves of a tree: {"params/w": "float32[4, 4]"}."""
  return {
    jax.tree_util.keystr(
      path, simple=True, separator="/"
    ): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _require_same_arrays(
  saved: dict[str, str], items: dict[str, Any], path: os.PathLike, fresh: str
) -> None:
  """Raises TargetError if items have other arrays than were saved."""
  held = {
    name: array
    for name, array in saved.items()
    if name.partition("/")[0] in items
  }
  wanted = arrays(items)
  both = [name for name in wanted if name in held]
  parts = {
    "other arrays": [
      f"{name} is {held[name]} there, {wanted[name]} here"
      for name in both
      if held[name] != wanted[name]
    ],
    "missing there": [
      name for name in wanted if name not in held and not _is_fresh(name, fresh)
    ],
    "only there": [
      name for name in held if name not in wanted and not _is_fresh(name, fresh)
    ],
  }
  if "rest" in items and not any(x.startswith("rest/") for x in held):
    raise TargetError(
      f"checkpoint {path} was written for use and has no state of an "
      "optimizer: begin a new run from it, by --config=configs/from_run.py:DIR"
    )
  if any(parts.values()):
    told = (f"{part}: {few(x)}" for part, x in parts.items() if x)
    raise TargetError(
      f"checkpoint {path} is of another model; {'; '.join(told)}. Go on with "
      "the settings and the version of UltraMem-JAX that wrote it, or use "
      "another --workdir; init_from takes what is the same in both"
    )


def _is_fresh(name: str, fresh: str) -> bool:
  return bool(fresh) and bool(re.match(fresh, name))


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
  """Returns what a leaf is restored to: on one device if it has no sharding."""
  sharding = getattr(leaf, "sharding", None)
  return jax.ShapeDtypeStruct(
    leaf.shape,
    leaf.dtype,
    sharding=sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0]),
  )


def _read_item(
  name: str, tree: Any, saved_in: dict[pathlib.Path, dict[str, str]]
) -> Any:
  """Reads a pytree from the directories that hold its arrays.

  An array that none of them holds is zero.

  Args:
    name: of the item.
    tree: its arrays as `jax.ShapeDtypeStruct`; at least one.
    saved_in: the arrays that each directory holds.
  """
  leaves, treedef = jax.tree.flatten_with_path(tree)
  targets = {array_reader.key(path): _target(leaf) for path, leaf in leaves}
  named = dict(zip(targets, arrays({name: tree}), strict=True))
  found = {}
  for folder, saved in saved_in.items():
    part = {k: x for k, x in targets.items() if named[k] in saved}
    found |= array_reader.read(folder / name, part) if part else {}
  for key in targets.keys() - found:
    x = targets[key]
    found[key] = jnp.zeros(x.shape, x.dtype, device=x.sharding)
  return jax.tree.unflatten(treedef, [found[key] for key in targets])


def _read(path: pathlib.Path, items: dict[str, Any], fresh: str) -> Restored:
  """Reads the named items of a step from the disk."""
  facts, store = step_dirs.facts(path), frozen.store_of(path)
  saved_in = {path: facts["arrays"]}
  if store:
    saved_in[store.path] = store.arrays()
  saved = {k: x for arrays in saved_in.values() for k, x in arrays.items()}
  if int(path.name) == 0:
    # Parameters from elsewhere bring no state of an optimizer.
    there = {name.partition("/")[0] for name in saved}
    items = {
      name: tree
      for name, tree in items.items()
      if name in there or not jax.tree.leaves(tree)
    }
  # The reader validates neither shape nor dtype.
  _require_same_arrays(saved, items, path, fresh)
  loss, due = step_dirs.valid_loss(path)
  # Orbax cannot save a pytree without leaves; such an item is returned as is.
  loaded = {
    name: _read_item(name, tree, saved_in)
    for name, tree in items.items()
    if jax.tree.leaves(tree)
  }
  return Restored(
    int(path.name), {**items, **loaded}, facts["data"], loss, due, store
  )


def read(
  path: pathlib.Path, items: dict[str, Any], fresh: str = ""
) -> Restored:
  """Reads a step; all processes agree on whether it is damaged.

  Args:
    path: its directory.
    items: as for `checkpoint.restore`.
    fresh: as for `Checkpointer.restore_latest`.
  Raises:
    FrozenError: the store that it refers to is damaged; it is not.
    Damaged: a digest differs, or an unsealed step cannot be decoded.
    TargetError: the step is sound, but items are not what it holds.
    OSError: it cannot be read now, which says nothing about it.
  """
  sealed, damage, trouble, lost = False, "", "", ""
  if jax.process_index() == 0:
    try:
      sealed = step_dirs.verify(path)
      store = frozen.store_of(path)
      if store:
        store.verify()
    except FrozenError as error:
      lost = str(error)
    except Damaged as error:
      damage = str(error)
    except OSError as error:
      trouble = str(error)
  if distributed.any_process(bool(lost)):
    raise FrozenError(lost or "frozen parameters are damaged: see process 0")
  _raise_together(damage, trouble)
  sealed = distributed.any_process(sealed)
  restored = None
  try:
    restored = _read(path, items, fresh)
  except (TargetError, FrozenError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Damaged as error:
    damage = str(error)
  except Exception as error:
    # TensorStore's errors are ValueErrors.
    if sealed and not isinstance(error, (OSError, ValueError)):
      raise
    text = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    # A sealed step has the bytes that were saved, so whatever went wrong is not
    # its fault. Nor is what the system could not do.
    if sealed or _is_of_system(error):
      trouble = text
    else:
      damage = text
  _raise_together(damage, trouble)
  assert restored is not None
  return restored


def _is_of_system(error: Exception) -> bool:
  """Returns whether the system failed to read a file that is there."""
  if isinstance(error, OSError):
    return not isinstance(error, (FileNotFoundError, NotADirectoryError))
  status = re.match(r"([A-Z_]+): ", str(error))
  return status is not None and status[1] not in CONTENT_STATUSES


def _raise_together(damage: str, trouble: str) -> None:
  """Raises on every process what went wrong on one: Damaged, or OSError."""
  if distributed.any_process(bool(trouble)):
    raise OSError(trouble or "another process cannot read a checkpoint")
  if distributed.any_process(bool(damage)):
    raise Damaged(damage or "see another process")


def require_readable(path: pathlib.Path, items: dict[str, Any]) -> None:
  """Opens a step that was saved, without reading its arrays.

  Args:
    path: its directory.
    items: pytrees of arrays, or their shapes, by name.
  Raises:
    Damaged: it does not hold them.
    OSError: it cannot be read now.
    ValueError: TensorStore cannot open it.
  """
  if step_dirs.facts(path)["arrays"] != arrays(items):
    raise Damaged(f"{step_dirs.FACTS} describes other arrays")
  for name, tree in items.items():
    if jax.tree.leaves(tree):
      array_reader.require_readable(path / name, tree)
