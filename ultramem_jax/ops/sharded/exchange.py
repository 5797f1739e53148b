"""What the devices that share a table send each other."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Exchange:
  """Collectives of the devices that share a table, for use in `shard_map`.

  T counts the tokens of one device, or of all devices that share the table.

  Attributes:
    table_axes: mesh axes over which the table is sharded, in the mesh's order.
    token_axes: those of them along which devices hold different tokens.
    copy_axes: those of them along which devices hold the same tokens.
    sizes: of the mesh's axes.
    dtype: in which numbers travel.
  """

  table_axes: tuple[str, ...]
  token_axes: tuple[str, ...]
  copy_axes: tuple[str, ...]
  sizes: Mapping[str, int]
  dtype: str

  def count(self, axes: Sequence[str]) -> int:
    """Returns the number of devices along axes."""
    return math.prod(self.sizes[axis] for axis in axes)

  def index(self) -> jax.Array | int:
    """Returns the number of this device's shard of the table."""
    return jax.lax.axis_index(self.table_axes) if self.table_axes else 0

  def gather(self, x: jax.Array) -> jax.Array:
    """Collects x [B, T, ...] of all tokens."""
    if not self.token_axes:
      return x
    return jax.lax.all_gather(x, self.token_axes, axis=1, tiled=True)

  def all_to_all(
    self, x: jax.Array, split_axis: int, concat_axis: int
  ) -> jax.Array:
    """Sends each device with other tokens its part of x, and joins the parts.

    Computes what jax.lax.all_to_all over all `token_axes` at once would. One
    axis after the other moves each part the same way over a torus of chips;
    for all at once, XLA's TPU compiler plans a way for every pair of devices,
    which takes half a minute for 256.
    """
    sizes = tuple(self.sizes[axis] for axis in self.token_axes)
    x = x.reshape(*x.shape[:split_axis], *sizes, -1, *x.shape[split_axis + 1 :])
    for place, axis in enumerate(self.token_axes, split_axis):
      x = jax.lax.all_to_all(x, axis, place, place, tiled=True)
    count = len(sizes)
    x = jnp.moveaxis(
      x,
      range(split_axis, split_axis + count),
      range(concat_axis, concat_axis + count),
    )
    return x.reshape(
      *x.shape[:concat_axis], -1, *x.shape[concat_axis + count + 1 :]
    )

  def sums_to_tokens(self, x: jax.Array) -> jax.Array:
    """Adds x [B, T, ...] of all tokens over shards; keeps a device's own."""
    x = x.astype(self.dtype)
    if self.token_axes:
      x = jax.lax.psum_scatter(
        x, self.token_axes, scatter_dimension=1, tiled=True
      )
    return jax.lax.psum(x, self.copy_axes) if self.copy_axes else x

  def columns_to_tokens(self, x: jax.Array) -> jax.Array:
    """Exchanges columns of all tokens for all columns of this device's tokens.

    From [B, T, ..., w] to [B, T, ..., W].
    """
    x = self.all_to_all(x, 1, x.ndim - 1)
    if self.copy_axes:
      x = jax.lax.all_gather(x, self.copy_axes, axis=x.ndim - 1, tiled=True)
    return self._reorder(x, self.copy_axes + self.token_axes, self.table_axes)

  def tokens_to_columns(self, x: jax.Array) -> jax.Array:
    """Exchanges all columns of this device's tokens for columns of all tokens.

    From [B, T, W] to [B, T, w].
    """
    x = self._reorder(x, self.table_axes, self.copy_axes + self.token_axes)
    if self.copy_axes:
      width = x.shape[-1] // self.count(self.copy_axes)
      start = jax.lax.axis_index(self.copy_axes) * width
      x = jax.lax.dynamic_slice_in_dim(x, start, width, axis=-1)
    return self.all_to_all(x, x.ndim - 1, 1)

  def _reorder(self, x, held, wanted):
    """Reorders slices of the last axis from one order of mesh axes to another.

    Args:
      x: [..., W].
      held, wanted: the same axes in two orders.
    """
    if held == wanted:
      return x
    lead = x.ndim - 1
    sliced = x.reshape(*x.shape[:-1], *(self.sizes[a] for a in held), -1)
    order = [lead + held.index(axis) for axis in wanted]
    sliced = sliced.transpose(*range(lead), *order, sliced.ndim - 1)
    return sliced.reshape(x.shape)
