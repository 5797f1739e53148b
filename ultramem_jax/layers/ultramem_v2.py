"""UltraMemV2 (arXiv 2508.18756): one table, a ring that all layers read."""

import flax.linen as nn
import jax.numpy as jnp

from ultramem_jax.layers import tables as tables_lib
from ultramem_jax.layers.linear import contract
from ultramem_jax.layers.parameter import parameter
from ultramem_jax.layers.ultramem import UltraMem


class UltraMemV2(UltraMem):
  """UltraMem with a shared ring of rows, and pre-values.

  The memories of a model, `ring_layers` of them, share a table of
  ring_layers n^2 rows. Memory i reaches `table_side`^2 of them, a share
  `share_ratio` of the ring, from row i n^2 on and around its end. With
  pre-values, a second table of the same rows, the scores of a row are
  multiplied by <pre_values[row], W_pre x> (or gelu of it).
  Pooled values of all blocks go through one projection (`shared_projection`).

  Variables and sown values are those of `UltraMem`; also `pre_projection`
  [D, W], W the width of pre-values. `values` and `pre_values` are parameters
  of the layer only where no `tables` are passed. A slot counts the rows from
  the first that this memory reaches: row + table_side^2 * block.
  """

  KIND = "ultramem_v2"
  NORM_EXPONENT = 0.4

  def _rows(self, slot_BTAM):
    """Returns the index for `pool_values`, and the row of the ring."""
    c = self.config
    slot_BTY = slot_BTAM.reshape(*slot_BTAM.shape[:2], -1)
    pool_BTY, row_BTY = jnp.divmod(slot_BTY, c.table_side**2)
    row_BTY += self.layer_index * c.num_keys**2 % c.num_rows
    row_BTY = jnp.where(row_BTY < c.num_rows, row_BTY, row_BTY - c.num_rows)
    if c.projections == 1:
      return row_BTY, row_BTY
    return row_BTY + c.num_rows * pool_BTY, row_BTY

  def _read(self, x_BTD, slot_BTAM, score_BTAMC, tables):
    c = self.config
    index_BTY, row_BTY = self._rows(slot_BTAM)
    score_BTYC = score_BTAMC.reshape(*index_BTY.shape, -1)
    if c.pre_value_dim:
      x_BTW = contract(
        self,
        "pre_projection",
        x_BTD,
        lambda: parameter(
          self,
          "pre_projection",
          nn.initializers.normal(self.embed_dim**-0.5),
          ("embed", "value"),
          (self.embed_dim, c.pre_value_dim),
        ),
      )
      pre_BTY = tables_lib.dot_values(
        self, tables, "pre_values", row_BTY, x_BTW
      )
      if c.pre_activation == "gelu":
        pre_BTY = nn.gelu(pre_BTY, approximate=False)
      score_BTYC *= pre_BTY[..., None]
    pooled_BTEW = tables_lib.pool_values(
      self, tables, "values", index_BTY, score_BTYC, c.projections
    )
    return self._project(pooled_BTEW.astype(self.dtype))
