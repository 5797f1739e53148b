"""Memory+ (Memory Layers at Scale, arXiv 2412.09764)."""

import flax.linen as nn

from ultramem_jax.layers import tables as tables_lib
from ultramem_jax.layers.linear import Linear
from ultramem_jax.layers.parameter import uniform
from ultramem_jax.layers.ultramem import UltraMem


class MemoryPlus(UltraMem):
  """Product-key memory with an input-dependent gate and a shared table.

    y = W_o ((sum of the rows of all heads, times softmax scores) * silu(W_g x))

  Queries are normalized. Keys are not: `key_norm` is an unused parameter, as in
  the UltraMem authors' implementation of Memory+. Each head has its own query;
  all layers of a model share the table.

  Variables and sown values are those of `UltraMem`; also the linear maps
  `gate` (with `input_gate`) and `output_gate` (with `imported.output_gate`).
  `values` is a parameter of the layer only where no `tables` are passed.
  """

  KIND = "memory_plus"
  NORM_EXPONENT = 0.0

  def _initializers(self):
    c = self.config
    fan_out = 2 * c.num_heads * c.key_dim
    key_bound = (2 * c.key_dim) ** -0.5
    query_bound = (6 / (self.embed_dim + fan_out)) ** 0.5
    return {
      "keys": uniform(key_bound),
      "query": uniform(query_bound),
      "value_projection": nn.initializers.normal(c.value_dim**-0.5),
    }

  def _keys(self):
    keys_PARNK, norm = super()._keys()
    if norm is not None:
      norm(keys_PARNK)  # only to make the parameter
    return keys_PARNK, None

  def _read(self, x_BTD, slot_BTAM, score_BTAMC, tables):
    c = self.config
    index_BTY = slot_BTAM.reshape(*slot_BTAM.shape[:2], -1)
    pooled_BTEW = tables_lib.pool_values(
      self,
      tables,
      "values",
      index_BTY,
      score_BTAMC.reshape(*index_BTY.shape, 1),
    ).astype(self.dtype)
    if c.input_gate:
      gate_BTW = self._linear("gate", c.value_dim, c.imported.projection_bias)(
        x_BTD
      )
      pooled_BTEW *= nn.silu(gate_BTW)[:, :, None]
    y_BTD = self._project(pooled_BTEW)
    if c.imported.output_gate:
      y_BTD *= nn.sigmoid(self._linear("output_gate", 1, True)(x_BTD))
    return y_BTD

  def _linear(self, name, width, bias):
    std = self.config.value_dim**-0.5
    axes = ("embed", "value" if name == "gate" else None)
    return Linear(
      (width,),
      std,
      axes,
      dtype=self.dtype,
      prepared_for=self.prepared_for,
      use_bias=bias,
      name=name,
    )
