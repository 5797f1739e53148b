"""PEER: a mixture of a million single neurons (arXiv 2407.04153)."""

import flax.linen as nn

from ultramem_jax.layers import tables as tables_lib
from ultramem_jax.layers.ultramem import UltraMem


class Peer(UltraMem):
  """Parameter-efficient expert retrieval: every row is a one-neuron expert.

    y = sum over heads and their m rows i of weight_i * gelu(<u_i, x>) * v_i

  The weights are the softmax of the head's scores (with `softmax`). Queries,
  keys and retrieval are those of `UltraMem`; with `score="sum"` they are the
  paper's product keys. Differs from the paper in the norm of the queries:
  LayerNorm or RMSNorm in place of BatchNorm.

  Variables and sown values are those of `UltraMem`, with two tables
  `down_values` (u) and `up_values` (v), both [I, D], in place of `values`.
  """

  KIND = "peer"

  def _tables(self):
    down, up = (
      tables_lib.value_table(self, self.config, self.num_layers, name)
      for name in ("down_values", "up_values")
    )
    return down | up

  def _read(self, x_BTD, slot_BTAM, score_BTAMC, tables):
    index_BTY = slot_BTAM.reshape(*slot_BTAM.shape[:2], -1)
    hidden_BTY = tables_lib.dot_values(
      self, tables, "down_values", index_BTY, x_BTD
    )
    weight_BTY = nn.gelu(hidden_BTY) * score_BTAMC.reshape(index_BTY.shape)
    y_BTED = tables_lib.pool_values(
      self, tables, "up_values", index_BTY, weight_BTY[..., None]
    )
    return y_BTED.squeeze(-2).astype(self.dtype)
