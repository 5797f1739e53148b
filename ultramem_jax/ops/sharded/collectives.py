"""What a device that shares a table knows of the others, and sends them."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Shard:
  """What a device knows of the others, within `shard_map`.

  axes: of the table, in the order of the mesh.
  apart: those of them along which devices hold other tokens.
  alike: those along which they hold the same.
  sizes: of the mesh's axes.
  dtype: in which numbers travel.
  """

  axes: tuple[str, ...]
  apart: tuple[str, ...]
  alike: tuple[str, ...]
  sizes: Mapping[str, int]
  dtype: str

  def count(self, axes) -> int:
    return math.prod(self.sizes[axis] for axis in axes)

  def index(self):
    """The number of this device's shard."""
    return jax.lax.axis_index(self.axes) if self.axes else 0

  def gather(self, x):
    """[B, N, ...] of the tokens of all devices that share the table."""
    if not self.apart:
      return x
    return jax.lax.all_gather(x, self.apart, axis=1, tiled=True)

  def swap(self, x, split: int, join: int):
    """Sends the parts of axis `split` to the devices `apart`, each its own.

    Those that come are joined along `join`, as jax.lax.all_to_all over all the
    mesh's axes at once would do it. One axis after the other moves each part
    the same way over a torus of chips; for all at once, XLA's TPU compiler
    plans the way of every pair of devices, half a minute for 256.
    """
    sizes = tuple(self.sizes[axis] for axis in self.apart)
    x = x.reshape(*x.shape[:split], *sizes, -1, *x.shape[split + 1 :])
    for place, axis in enumerate(self.apart, split):
      x = jax.lax.all_to_all(x, axis, place, place, tiled=True)
    count = len(sizes)
    x = jnp.moveaxis(x, range(split, split + count), range(join, join + count))
    return x.reshape(*x.shape[:join], -1, *x.shape[join + count + 1 :])

  def sums_to_tokens(self, x):
    """Adds up the parts [B, N of all, ...] of all shards: [B, N, ...]."""
    x = x.astype(self.dtype)
    if self.apart:
      x = jax.lax.psum_scatter(x, self.apart, scatter_dimension=1, tiled=True)
    return jax.lax.psum(x, self.alike) if self.alike else x

  def columns_to_tokens(self, x):
    """[B, N of all, ..., W / P] -> [B, N, ..., W]."""
    x = self.swap(x, 1, x.ndim - 1)
    if self.alike:
      x = jax.lax.all_gather(x, self.alike, axis=x.ndim - 1, tiled=True)
    return self._reorder(x, self.alike + self.apart, self.axes)

  def tokens_to_columns(self, x):
    """[B, N, W] -> [B, N of all, W / P]."""
    x = self._reorder(x, self.axes, self.alike + self.apart)
    if self.alike:
      width = x.shape[-1] // self.count(self.alike)
      start = jax.lax.axis_index(self.alike) * width
      x = jax.lax.dynamic_slice_in_dim(x, start, width, axis=-1)
    return self.swap(x, x.ndim - 1, 1)

  def _reorder(self, x, held, wanted):
    """Slices of the last axis, from the order of some axes to another."""
    if held == wanted:
      return x
    lead = x.ndim - 1
    sliced = x.reshape(*x.shape[:-1], *(self.sizes[a] for a in held), -1)
    order = [lead + held.index(axis) for axis in wanted]
    sliced = sliced.transpose(*range(lead), *order, sliced.ndim - 1)
    return sliced.reshape(x.shape)
