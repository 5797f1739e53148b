"""One tensor of theirs, and whole collections of them, in both directions."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ultramem_jax.settings.errors import ConfigError

Path = tuple[str | int, ...]


class Entry(NamedTuple):
  """One tensor of theirs and the arrays of ours that hold it.

  ours = theirs.reshape(split).transpose(axes); with several paths, that
  array's first axis runs over them. A path that ends in a number is that
  element of the array at the rest of the path.
  """

  shape: tuple[int, ...]
  split: tuple[int, ...]
  axes: tuple[int, ...]
  paths: tuple[Path, ...]

  def read(self, theirs: np.ndarray) -> dict[Path, np.ndarray]:
    """Our arrays, by path."""
    ours = theirs.reshape(self.split).transpose(self.axes)
    parts = [ours] if len(self.paths) == 1 else ours
    return dict(zip(self.paths, parts, strict=True))

  def write(self, ours: Mapping[Path, np.ndarray]) -> np.ndarray:
    """Their tensor, from our arrays by path."""
    parts = [ours[path] for path in self.paths]
    array = parts[0] if len(parts) == 1 else np.stack(parts)
    moved = [self.split[axis] for axis in self.axes]
    return (
      array.reshape(moved).transpose(np.argsort(self.axes)).reshape(self.shape)
    )


def entry(*paths: Path, split, axes=None, shape=None) -> Entry:
  axes = tuple(range(len(split))) if axes is None else axes
  return Entry(split if shape is None else shape, split, axes, paths)


def linear(path: Path, outputs: int, inputs: int) -> Entry:
  """A torch linear weight [out, in] as our kernel [in, out]."""
  return entry(path, split=(outputs, inputs), axes=(1, 0))


def _refuse(faults: list[str]) -> None:
  if faults:
    raise ConfigError(f"tensors do not fit: {'; '.join(faults)}")


def _advice(path: Path, held: tuple[int, ...], wanted: tuple[int, ...]) -> str:
  """What to do about a table that is stored with rows that nothing reads."""
  is_table = path[-1] in ("values", "pre_values")
  if is_table and held[1:] == wanted[1:] and held[0] > wanted[0]:
    return (
      " (of a table with storage.row_multiple, give the first "
      f"{wanted[0]} rows)"
    )
  return ""


def read(entries: dict[str, Entry], arrays: Mapping[str, Any]):
  """Our variables from their tensors, after one check of all of them."""
  faults = [f"{name} is missing" for name in entries if name not in arrays]
  for name, array in arrays.items():
    if name not in entries:
      faults.append(f"{name} is unknown")
    elif np.shape(array) != entries[name].shape:
      faults.append(
        f"{name} has shape {list(np.shape(array))}, must be "
        f"{list(entries[name].shape)}"
      )
  _refuse(faults)
  flat, parts = {}, {}
  for name, entry in entries.items():
    for path, array in entry.read(np.asarray(arrays[name])).items():
      kind = np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32
      if isinstance(path[-1], int):
        parts.setdefault(path[:-1], {})[path[-1]] = array.astype(kind)
      else:
        flat[path] = jnp.asarray(array.astype(kind))
  for path, elements in parts.items():
    flat[path] = jnp.stack([elements[i] for i in range(len(elements))])
  return traverse_util.unflatten_dict(flat)


def write(entries: dict[str, Entry], variables: Any) -> dict[str, np.ndarray]:
  """Their tensors from our variables, after one check of all of them."""
  variables = {
    name: nn.unbox(variables[name])
    for name in ("params", "buffers")
    if name in variables
  }
  flat = {}
  for path, array in traverse_util.flatten_dict(variables).items():
    if path[-1] == "core":
      flat |= {(*path, i): part for i, part in enumerate(np.asarray(array))}
    else:
      flat[path] = np.asarray(array)
  entries = {
    name: entry
    for name, entry in entries.items()
    if entry.paths[0][0] in variables
  }
  faults = []
  for entry in entries.values():
    moved = tuple(entry.split[axis] for axis in entry.axes)
    shape = moved if len(entry.paths) == 1 else moved[1:]
    for path in entry.paths:
      name = "/".join(map(str, path))
      if path not in flat:
        faults.append(f"{name} is missing")
      elif flat[path].shape != shape:
        faults.append(
          f"{name} has shape {list(flat[path].shape)}, must be {list(shape)}"
          f"{_advice(path, flat[path].shape, shape)}"
        )
  known = {path for entry in entries.values() for path in entry.paths}
  faults += [
    f"{'/'.join(map(str, path))} is unknown"
    for path in flat
    if path not in known
  ]
  _refuse(faults)
  named = {name: entry.write(flat) for name, entry in entries.items()}
  # Their indices are int64.
  return {
    name: array.astype(np.int64)
    if np.issubdtype(array.dtype, np.integer)
    else array
    for name, array in named.items()
  }
