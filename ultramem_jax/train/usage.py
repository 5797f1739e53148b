"""Counts of what the memories read.

U counts virtual rows, E I, and those that only storage has.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops.sharded import row_count
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.model import ModelConfig

# Keys are counted at one position of this many. Over many steps every key in
# use is still counted, and counting keys costs little beside counting rows.
KEY_STRIDE = 8


class Reads(NamedTuple):
  """The reads of one memory: an entry for everything that can be read.

  slots: [U], by virtual row; a few more where `row_multiple` says so.
  keys: [2 A N], by side, head and key.
  """

  slots: jax.Array
  keys: jax.Array


def new_reads(model: ModelConfig, dtype: Any) -> dict[str, Reads]:
  """Returns zeros for each memory of a model."""
  memory = model.memory
  num_keys = 2 * memory.num_heads * memory.grid_side
  return {
    span.name: Reads(
      jnp.zeros(memory.stored_slots, dtype), jnp.zeros(num_keys, dtype)
    )
    for span in model.spans
  }


def count(
  usage: dict[str, Reads],
  slots: dict[str, jax.Array],
  cells: dict[str, jax.Array],
  is_read_BT: jax.Array,
  layout: Layout | None = None,
) -> dict[str, Reads]:
  """Adds the reads of a batch to the counts.

  Args:
    usage: by memory, of int32, how often each was read.
    slots: by memory, [B, T, A, M] int32, the virtual rows read.
    cells: likewise, row * N + column of each head's grid.
    is_read_BT: [B, T] bool; the reads of other positions do not count.
    layout: of the arrays on a mesh; None: one device.
  Returns:
    The counts, as `usage`. Keys are counted at every `KEY_STRIDE`th position
    only.
  """

  def add(count_U, index_BTAM, is_read_BT):
    # Past the end, where it does not count.
    index_BTAM = jnp.where(
      is_read_BT[..., None, None], index_BTAM, count_U.size
    )
    return row_count.count_rows(
      count_U, index_BTAM.reshape(*index_BTAM.shape[:2], -1), layout
    )

  def add_all(memory, reads):
    cell_BTAM = cells[memory][:, ::KEY_STRIDE]
    heads = cell_BTAM.shape[2]
    side = reads.keys.size // (2 * heads)
    pair_BTAM = jnp.concatenate(jnp.divmod(cell_BTAM, side), axis=2)
    first_2A1 = side * jnp.arange(2 * heads, dtype=jnp.int32)[:, None]
    return Reads(
      add(reads.slots, slots[memory], is_read_BT),
      add(
        reads.keys,
        pair_BTAM + first_2A1[None, None],
        is_read_BT[:, ::KEY_STRIDE],
      ),
    )

  return {memory: add_all(memory, reads) for memory, reads in usage.items()}
