"""UltraMemV2 (arXiv 2508.18756): one table, a ring that all layers read."""

import flax.linen as nn
import jax.numpy as jnp

from ultramem_jax.layers import tables as tables_lib
from ultramem_jax.layers.ultramem import UltraMem


class UltraMemV2(UltraMem):
  """UltraMem with a shared ring of rows, and pre-values.

  The L memories of a model share a table of L n^2 rows. Memory l reaches
  `table_side`^2 of them, a share `share_ratio` of the ring, from row l n^2 on
  and around its end. With pre-values, a second table of the same rows, the
  scores of a row are multiplied by <pre_values[row], W_pre x> (or gelu of it).
  Pooled values of all blocks go through one projection (`shared_projection`).

  Variables and sown values are those of `UltraMem`; also `pre_projection`
  [D, U], U the width of pre-values. `values` and `pre_values` are parameters
  of the layer only where no `tables` are passed. A slot counts the rows from
  the first that this memory reaches: row + table_side^2 * block.
  """

  KIND = "ultramem_v2"
  NORM_EXPONENT = 0.4

  def _rows(self, slot_BTAM):
    """Index of `pool_rows`, and row of the ring, both [B, T, A * M]."""
    c = self.config
    slot_BTK = slot_BTAM.reshape(*slot_BTAM.shape[:2], -1)
    block_BTK, row_BTK = jnp.divmod(slot_BTK, c.table_side**2)
    row_BTK += self.layer_index * c.num_keys**2 % c.num_rows
    row_BTK = jnp.where(row_BTK < c.num_rows, row_BTK, row_BTK - c.num_rows)
    if c.projections == 1:
      return row_BTK, row_BTK
    return row_BTK + c.num_rows * block_BTK, row_BTK

  def _read(self, x_BTD, slot_BTAM, score_BTAMC, tables):
    c = self.config
    index_BTK, row_BTK = self._rows(slot_BTAM)
    score_BTKC = score_BTAMC.reshape(*index_BTK.shape, -1)
    if c.pre_value_dim:
      kernel_DU = self._param(
        "pre_projection",
        nn.initializers.normal(self.embed_dim**-0.5),
        ("embed", "value"),
        (self.embed_dim, c.pre_value_dim),
      )
      pre_BTK = tables_lib.dot_rows(
        self,
        tables,
        "pre_values",
        row_BTK,
        x_BTD @ kernel_DU.astype(self.dtype),
      )
      if c.pre_activation == "gelu":
        pre_BTK = nn.gelu(pre_BTK, approximate=False)
      score_BTKC *= pre_BTK[..., None]
    pooled_BTEW = tables_lib.pool_rows(
      self, tables, "values", index_BTK, score_BTKC, c.projections
    )
    return self._project(pooled_BTEW.astype(self.dtype))
