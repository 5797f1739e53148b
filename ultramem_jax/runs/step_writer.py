"""Writes a step with Orbax, and sees that it can be read again."""

import math
import pathlib
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from ultramem_jax.runs import array_reader, step_dirs, step_reader
from ultramem_jax.runs.step_dirs import Damaged
from ultramem_jax.settings.errors import CheckpointError, first_line

# Larger arrays are stored in chunks of rows, so that they can be read in parts.
# The C library returns memory of this size to the system as soon as it is free.
CHUNK_BYTES = 2**26
TRIAL = ".trial"  # what is saved to see whether it can be


def _storage(
  key: Any, value: jax.Array
) -> ocp.options.ArrayOptions.Saving.StorageOptions:
  """Returns Orbax's options for storing an array."""
  del key
  options = ocp.options.ArrayOptions.Saving.StorageOptions()
  part = value.sharding.shard_shape(value.shape)
  size = math.prod(part) * value.dtype.itemsize
  least = -(-size // CHUNK_BYTES)
  # Not for arrays that are split by columns, nor for a number of rows without a
  # suitable divisor: Orbax would cut them into slivers.
  if least > 1 and part[1:] == value.shape[1:] and part[0] == max(part):
    for count in range(least, 16 * least):
      if part[0] % count == 0:
        options.chunk_byte_size = size // count
        break
  return options


def start(path: pathlib.Path, items: dict[str, Any], facts: Any) -> Any:
  """Starts Orbax's save of a step, or of frozen parameters.

  Args:
    path: of the directory, absent.
    items: pytrees of arrays by name.
    facts: what is saved besides them, for `step_dirs.facts`.
  Returns:
    A response that waits for the commit; then comes `seal`.
  """
  context = ocp.Context()
  # Compression would hold all arrays in memory a second time, and parameters
  # hardly become smaller.
  context.array.saving.use_compression = False
  context.array.saving.scoped_storage_options_creator = _storage
  with context:
    return ocp.save_checkpointables_async(
      str(path),
      {name: tree for name, tree in items.items() if jax.tree.leaves(tree)},
      custom_metadata=facts,
    )


def seal(path: pathlib.Path, items: Any) -> None:
  """Opens what was committed, forces it to the disk, and seals it.

  Args:
    path: that `start` was given.
    items: pytrees of the shapes of its arrays, by name.
  Raises:
    CheckpointError: it cannot be opened again.
    OSError: it cannot be forced to the disk.
  """
  try:
    step_reader.require_readable(path, items)
  except (Damaged, OSError, ValueError) as error:
    raise CheckpointError(
      f"checkpoint {path} was written, but cannot be opened again "
      f"({first_line(error)}); earlier ones are whole"
    ) from error
  step_dirs.seal(path)


def try_save(root: pathlib.Path) -> None:
  """Saves a small array in a directory, and opens and deletes it again."""
  path = root / TRIAL
  is_first = jax.process_index() == 0
  for leftover in root.glob(f"{TRIAL}*") if is_first else ():
    step_dirs.delete(leftover)
  # On all devices, as those of all processes must have a part of it.
  mesh = jax.sharding.Mesh(jax.devices(), "x")
  places = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  zero = np.zeros(1, np.float32)
  tree = {"x": jax.make_array_from_callback((1,), places, lambda _: zero)}
  start(path, {"params": tree}, {}).result()
  if is_first:
    array_reader.require_readable(path / "params", tree)
    step_dirs.delete(path)
