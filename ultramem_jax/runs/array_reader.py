"""Reads saved arrays to the devices that hold them, a block at a time.

Orbax reads a device's whole part of an array before it puts it there, so the
part is in memory twice: a state that fills the memory could be saved, but not
restored. This module reads the arrays itself, from the format that Orbax
documents: an OCDBT store for each pytree with a Zarr array for each leaf.
"""

import collections
import os
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts

BLOCK_BYTES = 2**26  # read of an array at once, unless a chunk is larger
AHEAD_BYTES = 2**27  # of blocks that are read ahead


class _Part(NamedTuple):
  """A part of an array, and the devices of this process that hold it.

  devices: each holds a copy.
  blocks: the part cut along the first axis, as stored; not read yet.
  """

  devices: list[jax.Device]  # pyright: ignore[reportInvalidTypeForm]
  blocks: list[ts.TensorStore]


def read(folder: str | os.PathLike, tree: Any) -> Any:
  """Reads a pytree that Orbax saved.

  Args:
    folder: the pytree's directory.
    tree: pytree of `jax.ShapeDtypeStruct` with the saved shapes and dtypes, and
      with shardings. The reader validates neither shape nor dtype.
  Returns:
    The tree of arrays. While they are read, no more than a few blocks are in
    memory besides them.
  Raises:
    ValueError: an array is missing, or its bytes cannot be decoded.
  """
  targets, treedef = jax.tree.flatten(tree)
  parts = [
    _parts(store, target)
    for store, target in zip(_open(folder, tree), targets, strict=True)
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


def require_readable(folder: str | os.PathLike, tree: Any) -> None:
  """Opens the arrays of a pytree that Orbax saved, and reads none.

  Args:
    folder: the pytree's directory.
    tree: pytree of arrays, or of their shapes and dtypes.
  Raises:
    ValueError: an array is missing, or has another shape or dtype.
  """
  stores = _open(folder, tree)
  for store, leaf in zip(stores, jax.tree.leaves(tree), strict=True):
    saved = store.shape, store.dtype.numpy_dtype
    if saved != (leaf.shape, np.dtype(leaf.dtype)):
      raise ValueError(f"{folder} holds {saved}, not {leaf}")


def key(path: Any) -> str:
  """Returns the name by which a pytree's directory has the array at a path."""
  return jax.tree_util.keystr(path, simple=True, separator=".")


def _open(folder: str | os.PathLike, tree: Any) -> list[ts.TensorStore]:
  """Opens the arrays of a pytree, in the order of its leaves."""
  paths, _ = jax.tree.flatten_with_path(tree)
  opening = [
    ts.open(
      {
        "driver": "zarr3",
        "kvstore": {
          "driver": "ocdbt",
          "base": {"driver": "file", "path": f"{os.fspath(folder)}/"},
          "path": key(path),
        },
        "fill_missing_data_reads": False,
      },
      open=True,
      read=True,
    )
    for path, _ in paths
  ]
  return [store.result() for store in opening]


def _parts(store: ts.TensorStore, target: Any) -> list[_Part]:
  """Returns the distinct parts of an array on this process's devices.

  Args:
    store: the array.
    target: `jax.ShapeDtypeStruct` with a sharding.
  """
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
  """Cuts a part of an array into blocks along the first axis.

  Blocks end where chunks do, because only whole chunks can be read.

  Args:
    store: the array.
    bounds: (start, stop) of the part along each axis.
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
  """Yields the contents of each block while the next ones are being read."""
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
  """Puts a part on each of its devices.

  Args:
    part: the devices and blocks.
    target: the whole array.
    contents: yields the contents of the part's blocks next.
  """
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
      # Otherwise more blocks would be read before this one is freed.
      shard.block_until_ready()
  return jax.block_until_ready(
    [shard, *(jax.device_put(shard, device) for device in others)]
  )


def _write_rows(shard, block, start):
  return jax.lax.dynamic_update_slice_in_dim(shard, block, start, axis=0)


_write = jax.jit(_write_rows, donate_argnums=0)
