"""Counts of reads that the devices of a mesh share."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded.layout import Layout


def count_rows(
  count_U: jax.Array, slot_BTY: jax.Array, layout: Layout | None = None
) -> jax.Array:
  """Adds 1 to count[slot] for every slot; the counts are sharded.

  Either slots travel to the devices that count them, or the counts of each
  device's own slots travel and are added, whichever is smaller.

  Args:
    count_U: [U] int32, sharded over the table's axes where they divide it.
    slot_BTY: [B, T, Y] int32, at least 0; slots from U on are not counted.
    layout: None: one device.
  """
  if not layout_lib.spans_devices(layout):
    return count_U.at[slot_BTY].add(1, mode="drop")
  axes = layout.dividing(layout.table_axes, count_U.size)
  spec = layout.tokens(*slot_BTY.shape[:2])
  token_axes = layout.token_axes(*slot_BTY.shape[:2])
  shared = tuple(axis for axis in token_axes if axis in axes)
  others = tuple(axis for axis in token_axes if axis not in axes)

  def count_all(slot_BTY):
    """Counts all slots in the part of the counts that this device holds."""
    held = count_U.size // layout.size(axes)
    if shared:
      slot_BTY = jax.lax.all_gather(slot_BTY, shared)
    if axes:
      slot_BTY -= jax.lax.axis_index(axes) * held
    # A negative index would count from the end.
    slot_BTY = jnp.where(slot_BTY < 0, held, slot_BTY)
    return jnp.zeros(held, jnp.int32).at[slot_BTY].add(1, mode="drop")

  def count_own(slot_BTY):
    """Counts each device's own slots in all counts, and adds those up."""
    new_U = jnp.zeros(count_U.size, jnp.int32).at[slot_BTY].add(1, mode="drop")
    for axis in axes:
      parts_Ou = new_U.reshape(layout.size((axis,)), -1)
      if axis in shared:
        new_U = jax.lax.psum_scatter(parts_Ou, axis)
      else:
        new_U = parts_Ou[jax.lax.axis_index(axis)]
    return new_U

  def count(count_u, own_BTY):
    counts = count_all if slot_BTY.size < count_U.size else count_own
    new_u = counts(own_BTY)
    return count_u + (jax.lax.psum(new_u, others) if others else new_u)

  held = PartitionSpec(axes)
  return layout.shard_map(count, (held, spec), held)(count_U, slot_BTY)
