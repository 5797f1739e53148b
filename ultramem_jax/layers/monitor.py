"""What a memory layer sows: its choices, its auxiliary loss and statistics."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.ops import tucker
from ultramem_jax.ops.retrieval import Retrieved


def sow(
  module: nn.Module,
  found: Retrieved,
  slot_BTAM: jax.Array,
  score_BTAMC: jax.Array,
  core_CARR: jax.Array | None,
  y_BTD: jax.Array,
  segment_BT: jax.Array,
) -> None:
  """Sows what `layers.ultramem.UltraMem` lists.

  Args:
    module: an UltraMem layer.
    found: the cells chosen.
    slot_BTAM: their slots, after the shuffle.
    score_BTAMC: their scores, after the softmax, if any.
    core_CARR: the Tucker core; None: the score is a sum.
    y_BTD: the layer's output.
    segment_BT: 0 where there is padding, which statistics leave out.
  """
  c = module.config
  cell_BTAM = found.row_BTAM * c.grid_side + found.column_BTAM
  module.sow("intermediates", "cell_BTAM", cell_BTAM)
  module.sow("intermediates", "slot_BTAM", slot_BTAM)
  module.sow("intermediates", "score_BTAMC", score_BTAMC)
  present_BT1 = segment_BT[..., None] > 0
  total_BTAM = found.score_BTAMC.sum(-1)
  for name, index in (("score_top_1", 0), ("score_top_m", -1)):
    mean = total_BTAM[..., index].mean(where=present_BT1)
    module.sow("stats", name, mean)
  output_std = y_BTD.astype(jnp.float32).std(where=present_BT1)
  module.sow("stats", "output_std", output_std)
  if core_CARR is None or c.rank == 1:
    return
  module.sow(
    "losses",
    "auxiliary",
    tucker.auxiliary_loss(core_CARR, c.aux_loss_weight, c.aux_loss_margin),
  )
  lambda_AR = tucker.singular_values(core_CARR)
  module.sow(
    "stats", "core_lambda_ratio", (lambda_AR[:, 1] / lambda_AR[:, 0]).mean()
  )
