"""Reads saved arrays to the devices that hold them, a block at a time.

Orbax reads all that a device holds of an array before it puts it there, and
has it twice meanwhile: a state that fills the memory could be saved, but not
restored. So its arrays are read here, from the format that it documents: an
OCDBT store for each pytree, in it a Zarr array for each leaf.
"""

import collections
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

BLOCK_BYTES = 2**26  # of an array in one read, unless a chunk is larger
AHEAD_BYTES = 2**27  # of the blocks that are read before they are asked for


class _Part(NamedTuple):
  """What some devices of this process hold of an array.

  devices: each has a copy.
  blocks: along the first axis; as they are stored, not read yet.
  """

  devices: list[jax.Device]
  blocks: list[ts.TensorStore]


def read(folder: str | os.PathLike, tree: Any) -> Any:
  """Reads a pytree that Orbax saved.

  Args:
    folder: of the pytree.
    tree: of `jax.ShapeDtypeStruct` with shardings, of the saved shapes and
      dtypes.
  Returns:
    The tree of arrays. No more than a few blocks are in memory beside them
    while they are read.
  Raises:
    ValueError: an array is missing, or its bytes make none.
  """
  paths, treedef = jax.tree.flatten_with_path(tree)
  opening = [
    ts.open(
      {
        "driver": "zarr3",
        "kvstore": {
          "driver": "ocdbt",
          "base": {"driver": "file", "path": f"{os.fspath(folder)}/"},
          "path": jax.tree_util.keystr(path, simple=True, separator="."),
        },
        "fill_missing_data_reads": False,
      },
      open=True,
      read=True,
    )
    for path, _ in paths
  ]
  targets = [target for _, target in paths]
  parts = [
    _parts(store.result(), target)
    for store, target in zip(opening, targets, strict=True)
  ]
  contents = _read_ahead(
    block for of_array in parts for part in of_array for block in part.blocks
  )
  return jax.tree.unflatten(
    treedef,
    [
      jax.make_array_from_single_device_arrays(
        target.shape,
        target.sharding,
        [shard for part in of_array for shard in _put(part, target, contents)],
      )
      for target, of_array in zip(targets, parts, strict=True)
    ],
  )


def _parts(store: ts.TensorStore, target: jax.ShapeDtypeStruct) -> list[_Part]:
  """The different parts of an array on this process's devices."""
  places = target.sharding.addressable_devices_indices_map(target.shape)
  devices = collections.defaultdict(list)
  for device, index in places.items():
    bounds = (
      part.indices(size)[:2]
      for part, size in zip(index, target.shape, strict=True)
    )
    devices[tuple(bounds)].append(device)
  return [
    _Part(holders, _blocks(store, bounds))
    for bounds, holders in devices.items()
  ]


def _blocks(store: ts.TensorStore, bounds: tuple) -> list[ts.TensorStore]:
  """What lies within bounds, (start, stop) of each axis, cut along the first.

  Only whole chunks are read, so blocks end where chunks do.
  """
  if not bounds:
    return [store]
  (start, stop), *others = bounds
  others = [slice(*pair) for pair in others]
  length = store.chunk_layout.read_chunk_template.shape[0]
  row = store[(0, *others)].size * store.dtype.numpy_dtype.itemsize
  length *= max(1, BLOCK_BYTES // (length * row))
  ends = [*range(start // length * length + length, stop, length), stop]
  return [
    store[(slice(begin, end), *others)]
    for begin, end in zip([start, *ends], ends, strict=False)
  ]


def _read_ahead(blocks: Iterable[ts.TensorStore]) -> Iterator[np.ndarray]:
  """Yields the contents of blocks in turn; the next are being read by then."""
  reading, sizes = collections.deque(), collections.deque()
  for block in blocks:
    size = block.size * block.dtype.numpy_dtype.itemsize
    while reading and sum(sizes) + size > AHEAD_BYTES:
      sizes.popleft()
      yield reading.popleft().result()
    reading.append(block.read())
    sizes.append(size)
  while reading:
    yield reading.popleft().result()


def _put(
  part: _Part, target: jax.ShapeDtypeStruct, contents: Iterator[np.ndarray]
) -> list[jax.Array]:
  """A part on each of its devices; the next contents are of its blocks."""
  first, *others = part.devices
  if len(part.blocks) == 1:
    shard = jax.device_put(next(contents), first)
  else:
    shape = target.sharding.shard_shape(target.shape)
    shard, start = jnp.zeros(shape, target.dtype, device=first), 0
    for _ in part.blocks:
      block = next(contents)
      shard = _write(shard, jax.device_put(block, first), start)
      start += len(block)
      # Else more blocks are read before this one is gone.
      shard.block_until_ready()
  return jax.block_until_ready(
    [shard, *(jax.device_put(shard, device) for device in others)]
  )


def _write_rows(shard, block, start):
  return jax.lax.dynamic_update_slice_in_dim(shard, block, start, axis=0)


_write = jax.jit(_write_rows, donate_argnums=0)
