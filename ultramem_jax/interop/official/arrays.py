"""Between the authors' tensors, by name, and variables of ours."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import traverse_util

from ultramem_jax.interop.tensors import Entry, Path
from ultramem_jax.settings.errors import ConfigError


def read(entries: dict[str, Entry], tensors: Mapping[str, Any]) -> Any:
  """Returns the variables that the tensors hold.

  Raises:
    ConfigError: a tensor is missing, unknown or of another shape; the message
      lists all of these.
  """
  faults = [f"{name} is missing" for name in entries if name not in tensors]
  for name, tensor in tensors.items():
    if name not in entries:
      faults.append(f"{name} is unknown")
    elif np.shape(tensor) != entries[name].shape:
      faults.append(_shape_fault(name, np.shape(tensor), entries[name].shape))
  _refuse(faults)
  flat, elements = {}, {}
  for name, entry in entries.items():
    for path, array in entry.to_arrays(np.asarray(tensors[name])).items():
      integer = np.issubdtype(array.dtype, np.integer)
      array = array.astype(np.int32 if integer else np.float32)
      if isinstance(path[-1], int):
        elements.setdefault(path[:-1], {})[path[-1]] = array
      else:
        flat[path] = array
  for path, parts in elements.items():
    flat[path] = np.stack([parts[i] for i in range(len(parts))])
  # Not by jnp.asarray, which compiles a program for every shape.
  return jax.device_put(traverse_util.unflatten_dict(flat))


def write(entries: dict[str, Entry], variables: Any) -> dict[str, np.ndarray]:
  """Returns the tensors, by name, that the variables hold.

  A collection that variables lacks is left out.

  Raises:
    ConfigError: an array is missing, unknown or of another shape; the message
      lists all of these.
  """
  variables = {
    name: nn.unbox(variables[name])
    for name in ("params", "buffers")
    if name in variables
  }
  arrays = {}
  for path, array in traverse_util.flatten_dict(variables).items():
    if path[-1] == "core":
      arrays |= {(*path, i): part for i, part in enumerate(np.asarray(array))}
    else:
      arrays[path] = np.asarray(array)
  entries = {
    name: entry
    for name, entry in entries.items()
    if entry.paths[0][0] in variables
  }
  _refuse(_array_faults(entries, arrays))
  tensors = {name: entry.to_tensor(arrays) for name, entry in entries.items()}
  # The authors' indices are int64.
  return {
    name: tensor.astype(np.int64)
    if np.issubdtype(tensor.dtype, np.integer)
    else tensor
    for name, tensor in tensors.items()
  }


def _array_faults(
  entries: dict[str, Entry], arrays: Mapping[Path, np.ndarray]
) -> list[str]:
  """Returns what keeps the arrays from filling the entries, one line each."""
  faults = []
  wanted = {}
  for entry in entries.values():
    wanted |= entry.array_shapes
  for path, shape in wanted.items():
    name = "/".join(map(str, path))
    if path not in arrays:
      faults.append(f"{name} is missing")
    elif arrays[path].shape != shape:
      held = arrays[path].shape
      faults.append(
        _shape_fault(name, held, shape) + _advice(path, held, shape)
      )
  faults += [
    f"{'/'.join(map(str, path))} is unknown"
    for path in arrays
    if path not in wanted
  ]
  return faults


def _shape_fault(
  name: str, held: tuple[int, ...], wanted: tuple[int, ...]
) -> str:
  return f"{name} has shape {list(held)}, must be {list(wanted)}"


def _advice(path: Path, held: tuple[int, ...], wanted: tuple[int, ...]) -> str:
  """Returns what to do about a table whose last rows are only storage."""
  is_table = path[-1] in ("values", "pre_values")
  if is_table and held[1:] == wanted[1:] and held[0] > wanted[0]:
    return (
      " (of a table with storage.row_multiple, give the first "
      f"{wanted[0]} rows)"
    )
  return ""


def _refuse(faults: list[str]) -> None:
  if faults:
    raise ConfigError(f"tensors do not fit: {'; '.join(faults)}")
