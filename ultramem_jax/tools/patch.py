"""Patches: what a fine-tuning has changed of memories, old and new.

Both are kept, so that a patch is applied and reverted to the bit, and the
sha256 of every array of the base that a patch may change, so that it meets no
other. These are the tables, of which a patch holds the rows that changed; and
the other parameters and buffers of memories, whose rows are the parts along
their first axis, and a single number is one row.
"""

import hashlib
import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import traverse_util

from ultramem_jax.runs.files import write_atomically
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError, few
from ultramem_jax.settings.model import ModelConfig
from ultramem_jax.train import init_from
from ultramem_jax.train.tables import is_memory

FORMAT = "ultramem_jax patch 1"
# What is done where two patches change a row in different ways.
ON_CONFLICT = ("refuse", "first", "last")


class Change(NamedTuple):
  """The rows of an array that differ: their numbers, ascending, and values."""

  rows: np.ndarray
  old: np.ndarray
  new: np.ndarray


class Patch(NamedTuple):
  """What turns a base into another model.

  base: sha256 by name of an array, such as "params/memory_0/values".
  changes: likewise, of the arrays that differ.
  """

  base: dict[str, str]
  changes: dict[str, Change]


def _may_change(name: str) -> bool:
  """Returns whether a patch may change an array of this name."""
  collection, _, path = name.partition("/")
  # Only memories have buffers.
  return collection == "buffers" or is_memory(path)


def _flatten(variables: Any) -> dict[str, Any]:
  return traverse_util.flatten_dict(dict(variables), sep="/")


def _bytes(x: Any) -> np.ndarray:
  """Returns the bits of an array [rows, ...] as [rows, bytes]."""
  x = np.ascontiguousarray(x)  # a single number becomes a row
  return x.reshape(len(x), math.prod(x.shape[1:])).view(np.uint8)


def digest(x: Any) -> str:
  """Returns the sha256 of an array: its dtype, shape and bits."""
  found = hashlib.sha256(f"{x.dtype}{list(x.shape)}".encode())
  found.update(_bytes(x).data)
  return found.hexdigest()


def require_same_settings(base: ModelConfig, tuned: ModelConfig) -> None:
  """Raises ConfigError if the numbers of two models mean different things."""
  changed = init_from.changes(base, tuned, ("memory", "moe"))
  require(
    not changed,
    "tuned",
    few(changed),
    "is another setting than the base's: a patch holds numbers only",
  )


def difference(base: Any, tuned: Any) -> Patch:
  """Returns the patch that turns the variables of one model into another's.

  Raises:
    ConfigError: they differ in more than memories, which is named; or not at
      all.
  """
  olds, news = _flatten(base), _flatten(tuned)
  changes, others = {}, []
  for name in sorted(olds.keys() | news.keys()):
    old, new = olds.get(name), news.get(name)
    if old is None or new is None:
      others.append(
        f"{name} (only {'the base' if new is None else 'the other'})"
      )
    elif _is_held_alike(name, old, new):
      continue
    elif (old.shape, old.dtype) != (new.shape, new.dtype):
      others.append(f"{name} ({old.dtype}{list(old.shape)} in the base)")
    else:
      change = _changed_rows(*map(np.atleast_1d, map(np.asarray, (old, new))))
      if len(change.rows) and _may_change(name):
        changes[name] = change
      elif len(change.rows):
        others.append(name)
  require(
    not others,
    "tuned",
    few(others),
    "differs from the base but belongs to no memory, and a patch holds only "
    "memories: train these alone, with "
    "--config.optim.trainable='memory.*values' or 'memory', in the dtype of "
    "the base (optim.frozen_dtype)",
  )
  if not changes:
    raise ConfigError(
      "the tuned model equals the base bit for bit: there is nothing to save"
    )
  hashes = {name: digest(x) for name, x in olds.items() if _may_change(name)}
  return Patch(hashes, changes)


def _is_held_alike(name: str, old: Any, new: Any) -> bool:
  """Returns whether a frozen array has the same numbers in another dtype."""
  is_frozen = not _may_change(name) and old.shape == new.shape
  return (
    is_frozen
    and old.dtype != new.dtype
    and bool((old.astype(np.float32) == new.astype(np.float32)).all())
  )


def _changed_rows(old: np.ndarray, new: np.ndarray) -> Change:
  rows = np.flatnonzero((_bytes(old) != _bytes(new)).any(1))
  return Change(rows, old[rows], new[rows])


def applied(variables: Any, patch: Patch) -> Any:
  """Returns the variables of a model with the new rows of a patch.

  Args:
    variables: of the base; the arrays that change are taken over.
    patch: made for it.
  Raises:
    ConfigError: it is not the base.
  """
  flat = _flatten(variables)
  _require_base(flat, patch)
  return _with_rows(
    flat, {name: (x.rows, x.new) for name, x in patch.changes.items()}
  )


def reverted(variables: Any, patch: Patch) -> Any:
  """Returns the variables of the base, of which a patch was applied.

  Args:
    variables: of the model with the new rows, which are taken over.
    patch: the patch.
  Raises:
    ConfigError: it is not the base with this patch.
  """
  back = {name: (x.rows, x.old) for name, x in patch.changes.items()}
  flat = _flatten(variables)
  _require_names(flat, patch)
  base = _with_rows(flat, back)
  _require_base(_flatten(base), patch)
  return base


def _with_rows(flat: dict[str, Any], rows: dict[str, Any]) -> Any:
  put = jax.jit(
    lambda x, row, new: jnp.atleast_1d(x).at[row].set(new).reshape(x.shape),
    donate_argnums=0,
  )
  changed = {name: put(flat[name], *new) for name, new in rows.items()}
  return traverse_util.unflatten_dict({**flat, **changed}, sep="/")


def _require_names(flat: dict[str, Any], patch: Patch) -> None:
  """Requires a model to have the arrays of a patch, in their shapes."""
  for name, change in patch.changes.items():
    held = flat.get(name)
    rows = held.shape[0] if held is not None and held.ndim else 1
    if (
      held is None
      or (held.shape[1:], held.dtype)
      != (change.old.shape[1:], change.old.dtype)
      or rows <= change.rows.max()
    ):
      raise ConfigError(
        f"{name} does not fit the patch, which is for another model"
      )


def _require_base(flat: dict[str, Any], patch: Patch) -> None:
  for name, wanted in patch.base.items():
    held = flat.get(name)
    if held is None or digest(held) != wanted:
      raise ConfigError(
        f"{name} does not have the sha256 of the patch's base, "
        f"{wanted[:12]}...: the patch is for another model, or for this one "
        "before it was changed"
      )


def merged(patches: list[Patch], on_conflict: str) -> Patch:
  """Returns the patch that makes the changes of several patches of one base.

  Args:
    patches: at least one.
    on_conflict: one of `ON_CONFLICT`: whose row is taken where they differ.
  Raises:
    ConfigError: they are of different bases; or they change rows in different
      ways, which are named, and on_conflict is "refuse".
  """
  whole, *others = patches
  for other in others:
    require(
      whole.base == other.base,
      "patch",
      _differing(whole.base, other.base),
      "differs between the bases of the patches: only patches of one base can "
      "be merged",
    )
    changes, conflicts = dict(whole.changes), []
    for name, change in other.changes.items():
      held = changes.get(name, Change(*(x[:0] for x in change)))
      both, ours, theirs = np.intersect1d(
        held.rows, change.rows, return_indices=True
      )
      differ = (_bytes(held.new[ours]) != _bytes(change.new[theirs])).any(1)
      if differ.any():
        conflicts.append(f"{name} in the rows {few([*map(str, both[differ])])}")
      changes[name] = _union(held, change, on_conflict == "last")
    require(
      not conflicts or on_conflict != "refuse",
      "patch",
      "; ".join(conflicts),
      "is changed in different ways: --on_conflict=first or last takes the "
      "rows of the first or of the last patch",
    )
    whole = Patch(whole.base, changes)
  return whole


def _union(one: Change, other: Change, other_wins: bool) -> Change:
  """Returns the rows of both changes; of common ones those of the winner."""
  winner, loser = (other, one) if other_wins else (one, other)
  rest = ~np.isin(loser.rows, winner.rows)
  rows = np.concatenate([winner.rows, loser.rows[rest]])
  order = np.argsort(rows)
  old, new = (
    np.concatenate([x, y[rest]])[order]
    for x, y in ((winner.old, loser.old), (winner.new, loser.new))
  )
  return Change(rows[order], old, new)


def _differing(one: dict[str, str], other: dict[str, str]) -> str:
  names = sorted(one.keys() | other.keys())
  return ", ".join(x for x in names if one.get(x) != other.get(x))


def _content(changes: Mapping[str, Change]) -> str:
  """Returns the sha256 of changes."""
  lines = [
    f"{name} {' '.join(map(digest, changes[name]))}" for name in sorted(changes)
  ]
  return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write(path: str, patch: Patch) -> None:
  """Writes a patch to a .safetensors file, whole or not at all."""
  tensors = {
    f"{kind}/{name}": array
    for name, change in patch.changes.items()
    for kind, array in change._asdict().items()
  }
  facts = {
    "format": FORMAT,
    "base": json.dumps(patch.base),
    "sha256": _content(patch.changes),
  }
  content = safetensors.numpy.save(tensors, facts)
  write_atomically(pathlib.Path(path), content)


def read(path: str) -> Patch:
  """Reads a patch.

  Raises:
    ConfigError: there is no such file, or it is not a patch, or damaged.
  """
  require(pathlib.Path(path).is_file(), "patch", path, "no such file")
  try:
    with safetensors.safe_open(path, "numpy") as file:
      facts = file.metadata() or {}
      tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
    if facts.get("format") != FORMAT:
      raise ValueError(f"its format is not {FORMAT!r}")
    names = (x.removeprefix("rows/") for x in tensors if x.startswith("rows/"))
    changes = {
      name: Change(*(tensors[f"{kind}/{name}"] for kind in Change._fields))
      for name in names
    }
    base = json.loads(facts["base"])
    if not (isinstance(base, dict) and changes.keys() <= base.keys()):
      raise ValueError("it changes what its base does not have")
    for name, change in changes.items():
      if change.rows.ndim != 1 or len({x.shape[:1] for x in change}) > 1:
        raise ValueError(f"the rows of {name} and their values do not match")
    if facts["sha256"] != _content(changes):
      raise ValueError("it is damaged: its sha256 is another")
    return Patch(base, changes)
  except (safetensors.SafetensorError, KeyError, ValueError) as error:
    raise ConfigError(
      f"patch = {path!r}: is not a patch ({type(error).__name__}: {error})"
    ) from error


def describe(paths: Iterable[str]) -> str:
  """Returns a table of patches, the largest first: bytes, rows, bases."""
  lines = []
  for path in paths:
    patch = read(path)
    size = pathlib.Path(path).stat().st_size
    rows = ", ".join(
      f"{name.removeprefix('params/')} {len(change.rows)}"
      for name, change in sorted(patch.changes.items())
    )
    base = hashlib.sha256(json.dumps(patch.base, sort_keys=True).encode())
    lines.append((size, path, base.hexdigest()[:12], rows))
  return "\n".join(
    f"{size:>12,} bytes  base {base}  {path}  rows: {rows}"
    for size, path, base, rows in sorted(lines, reverse=True)
  )
