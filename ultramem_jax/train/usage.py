"""How often the rows of the tables are read.

U counts virtual rows, E I, and those that only storage has.
"""

import jax
import jax.numpy as jnp

from ultramem_jax.ops.sharded import row_count
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.config import Config
from ultramem_jax.train.state import TrainState


def count(
  usage: dict[str, jax.Array],
  slots: dict[str, jax.Array],
  segments_BT: jax.Array,
  layout: Layout | None = None,
) -> dict[str, jax.Array]:
  """Adds the reads of a batch to the counts; padding reads do not count.

  Args:
    usage: by memory, [U] int32, how often each virtual row was read.
    slots: by memory, [B, T, A, M] int32, the virtual rows read.
    segments_BT: [B, T] int32, 0 where there is padding.
    layout: of the arrays on a mesh; None: one device.
  Returns:
    The counts, as `usage`.
  """

  def add(usage_U, slot_BTAM):
    present_BT11 = segments_BT[..., None, None] > 0
    # Past the end, where it does not count.
    slot_BTAM = jnp.where(present_BT11, slot_BTAM, usage_U.size)
    return row_count.count_rows(
      usage_U, slot_BTAM.reshape(*slot_BTAM.shape[:2], -1), layout
    )

  return {
    memory: add(usage_U, slots[memory]) for memory, usage_U in usage.items()
  }


def report(
  state: TrainState, *, config: Config
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns how the tables were used since the last report, and starts anew.

  Returns:
    (state with usage at zero, metrics): for each memory, the share of
    physical and of virtual rows in reach read, and KL(usage of physical rows ||
    uniform) in nats.
  """
  num_rows = config.model.memory.table_side**2
  num_slots = config.model.memory.grid_side**2
  metrics = {}
  for memory, usage_U in state.usage.items():
    usage_U = usage_U[:num_slots]
    usage_I = usage_U.reshape(-1, num_rows).sum(0, dtype=jnp.int32)
    # In float32: the reads of all rows between two reports may be more than
    # an int32 holds, as those of a published config are.
    share_I = usage_I / jnp.maximum(usage_I.sum(dtype=jnp.float32), 1)
    metrics |= {
      f"{memory}/coverage": (usage_I > 0).mean(),
      f"{memory}/coverage_virtual": (usage_U > 0).mean(),
      f"{memory}/usage_kl": jnp.sum(
        jax.scipy.special.xlogy(share_I, share_I * num_rows)
      ),
    }
  usage = jax.tree.map(jnp.zeros_like, state.usage)
  return state.replace(usage=usage), metrics
