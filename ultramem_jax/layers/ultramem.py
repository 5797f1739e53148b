"""The UltraMem layer (paper section 3): parameters, and the ops they go to."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers import keys as keys_lib
from ultramem_jax.layers import monitor
from ultramem_jax.layers import tables as tables_lib
from ultramem_jax.layers.convolution import CausalConv
from ultramem_jax.layers.gate import Gate
from ultramem_jax.layers.linear import contract
from ultramem_jax.layers.norm import make_norm
from ultramem_jax.layers.parameter import parameter
from ultramem_jax.layers.query import calibrated_query_weight, spread_queries
from ultramem_jax.ops import retrieval, shuffle, tucker
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.memory import MemoryConfig

# Up to this many tokens merged keys are faster than the scores of all ranks: at
# 8 they are, at 64 not (`python -m benchmarks.inference --parts=keys`).
MERGED_TOKENS = 8


class UltraMem(nn.Module):
  """Ultra-sparse memory: reads a few rows of a large table per token.

    y = sum_e W_e^T (sum of the chosen rows of pool e, each times its score)

  Product keys with a Tucker-decomposed score choose the rows. `MemoryConfig`
  has the switches that turn parts off.

  Variables:
    params: `values` [I, W] the table; `keys` [P, A, R, N, K]; `core`
      [C, A, R, R]; `query` [D, P, G, R, K]; `value_projection` [E, W, D];
      `query_norm`, `key_norm` over K; `query_conv`; `gating`, see `Gate`; in
      imported layers also `query_bias` [P, G, R, K] and `value_projection_bias`
      [D].
    buffers: `u`, `t` [A, R], the filter vectors, to be refreshed once per
      training step by `refresh_buffers`; `permutation` [U], a stored shuffle.
    cache: the convolution's last inputs and their segments, when decoding.
    prepared: what `serve.prepare` computed from parameters, for a layer with
      `prepared_for`: `keys`, normalized; `merged_keys`, merged with u and t,
      where ranks share a query; for a CPU also `query` and `value_projection`,
      transposed.
  Sown when the collection is mutable:
    intermediates: `cell_BTAM` (cells before the shuffle, best first),
      `slot_BTAM` (after the shuffle: row + I * pool), `score_BTAMC` (after
      the softmax, if any).
    losses: `auxiliary`, to be added to the training loss.
    stats: scalars for monitoring, without padding. `score_top_1` and
      `score_top_m`, means over tokens and heads of the best and the last
      score chosen; `output_std`, over all numbers of the output;
      `core_lambda_ratio`, second singular value of the core over the first,
      mean over heads: what the rank-1 filter cannot see.

  Attributes:
    config: the layer's settings.
    embed_dim: D, width of input and output.
    num_layers: number L of layers of the residual stream that the output
      joins: paper init gives the output the variance 1 / (2 L).
    layer_index: gives each layer of a model its own shuffle.
    dtype: of the matmuls; scores are always float32.
    layout: how tokens and tables are split over a mesh; None: one device.
    prepared_for: see `model.Transformer`.
  """

  config: MemoryConfig
  embed_dim: int
  num_layers: int = 1
  layer_index: int = 0
  dtype: jnp.dtype = jnp.float32
  layout: Layout | None = None
  prepared_for: str | None = None

  KIND = "ultramem"  # the kind of its config
  # The authors initialize the weights of query and key norm with
  # K^-NORM_EXPONENT.
  NORM_EXPONENT = 0.33

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    segment_BT: jax.Array | None = None,
    decode: bool = False,
    tables: dict[str, Any] | None = None,
  ) -> jax.Array:
    """Reads the memory.

    Args:
      x_BTD: [B, T, D] float.
      segment_BT: [B, T] int32, the document of each position, from 1; the
        convolution does not cross documents. 0 is padding, which the stats
        leave out. None: one document.
      decode: keep the convolution's history in the collection "cache".
      tables: value tables by name, which layers of a model share; None: the
        layer has its own.
    Returns:
      [B, T, D] in `dtype`.
    Raises:
      ConfigError: the config is of another kind of memory, or its values are
        not as wide as D where nothing projects them.
      ValueError: x is not [B, T, D], or is empty; or segments are not [B, T].
    """
    c = self.config
    if segment_BT is None:
      segment_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    self._check(x_BTD, segment_BT)
    x_BTD = x_BTD.astype(self.dtype)
    core_CARR, filter_PAR = self._core()
    if self.prepared_for is None:
      keys, fold = keys_lib.scored_keys(*self._keys(), self.dtype)
    else:
      keys = keys_lib.prepared_keys(self, self._keys, filter_PAR)
      fold = lambda query_BTPGRK: query_BTPGRK
    query_BTPGRK = self._query(x_BTD, segment_BT, decode, core_CARR, filter_PAR)
    found = layout_lib.over_tokens(
      self._find,
      fold(query_BTPGRK).astype(self.dtype),
      (keys, core_CARR, filter_PAR),
      self.layout,
    )
    slot_BTAM = self._shuffle(found.row_BTAM, found.column_BTAM)
    score_BTAMC = found.score_BTAMC
    if c.softmax:
      score_BTAMC = jax.nn.softmax(score_BTAMC, axis=-2)
    if tables is None:
      tables = self._tables()
    y_BTD = self._read(x_BTD, slot_BTAM, score_BTAMC, tables)
    if c.gate != "none":
      y_BTD = Gate(c, name="gating")(x_BTD, y_BTD, segment_BT)
    if not self.is_initializing():
      monitor.sow(
        self, found, slot_BTAM, score_BTAMC, core_CARR, y_BTD, segment_BT
      )
    return y_BTD

  def _check(self, x_BTD, segment_BT):
    """Raises the errors of `__call__`."""
    c = self.config
    require(
      c.kind == self.KIND,
      "model.memory.kind",
      c.kind,
      f"must be {self.KIND!r} for a layer {type(self).__name__}",
    )
    c.require_width(self.embed_dim)
    c.require_grid()
    if x_BTD.ndim != 3 or x_BTD.shape[-1] != self.embed_dim or not x_BTD.size:
      raise ValueError(
        f"x has shape {x_BTD.shape}: must be [B, T, {self.embed_dim}] with "
        "B and T at least 1"
      )
    if segment_BT.shape != x_BTD.shape[:2]:
      raise ValueError(
        f"segment_BT has shape {segment_BT.shape}: must be [B, T] as x, "
        f"{x_BTD.shape[:2]}"
      )

  def _initializers(self):
    """Returns the initializers of keys, query and value projection."""
    c = self.config
    fan_in = {"paper": self.embed_dim, "official": c.key_dim}[c.init]
    return {
      "keys": nn.initializers.normal(c.key_dim**-0.5),
      "query": nn.initializers.normal(fan_in**-0.5),
      "value_projection": nn.initializers.normal(
        (c.projections * c.value_dim) ** -0.5
      ),
    }

  def _keys(self):
    """Returns the float32 keys [P, A, R, N, K], and their `KeyNorm` or None."""
    c = self.config
    keys_PARNK = parameter(
      self,
      "keys",
      self._initializers()["keys"],
      ("side", "memory_heads", "rank", "keys", "key"),
      (2, c.num_heads, c.rank, c.grid_side, c.key_dim),
    )
    if c.query_key_norm == "none":
      return keys_PARNK, None
    exponent = 0.5 if c.init == "paper" else self.NORM_EXPONENT
    return keys_PARNK, keys_lib.KeyNorm(
      c.query_key_norm,
      c.norm_eps,
      c.imported.norm_bias,
      c.key_dim,
      nn.initializers.constant(c.key_dim**-exponent),
      name="key_norm",
    )

  def _core(self):
    """Returns the core [C, A, R, R] and filter [P, A, R]; None for the sum."""
    c = self.config
    if c.score == "sum":
      return None, None
    core_CARR = parameter(
      self,
      "core",
      nn.initializers.uniform(1.0),
      ("cores", "memory_heads", "rank", None),
      (c.num_cores, c.num_heads, c.rank, c.rank),
    )
    u_AR, t_AR = (
      self.variable(
        "buffers", name, lambda i=i: tucker.filter_vectors(core_CARR)[i]
      ).value
      for i, name in enumerate(("u", "t"))
    )
    return core_CARR, jnp.stack([u_AR, t_AR])

  def _query(self, x_BTD, segment_BT, decode, core_CARR, filter_PAR):
    """Returns normalized float32 queries [B, T, P, G, R, K]; G divides A."""
    c = self.config
    if c.query_conv:
      x_BTD = CausalConv(c.query_conv, name="query_conv")(
        x_BTD, segment_BT, decode
      )
    ranks = c.rank if c.query_per_rank else 1
    axes = "side", "memory_heads", "rank", "key"
    outputs = 2, c.num_queries, ranks, c.key_dim
    query_BTPGRK = contract(
      self,
      "query",
      x_BTD,
      lambda: parameter(
        self,
        "query",
        self._initializers()["query"],
        ("embed", *axes),
        (self.embed_dim, *outputs),
      ),
    )
    if c.imported.query_bias:
      query_BTPGRK += parameter(
        self, "query_bias", nn.initializers.zeros, axes, outputs
      ).astype(self.dtype)[None, None]
    weight = c.key_dim**-self.NORM_EXPONENT
    if c.init == "paper" and self.is_initializing():
      weight = calibrated_query_weight(
        c,
        self.make_rng("params"),
        nn.unbox(self.get_variable("params", "keys")),
        core_CARR,
        filter_PAR,
        self.layout,
      )
    query_BTPGRK = query_BTPGRK.astype(jnp.float32)
    if c.query_key_norm != "none":
      query_BTPGRK = make_norm(
        c.query_key_norm,
        c.norm_eps,
        c.imported.norm_bias,
        "query_norm",
        "key",
        nn.initializers.constant(weight),
      )(query_BTPGRK)
    return spread_queries(c, query_BTPGRK)

  def _find(self, query_BTPGRK, weights):
    """Returns the cells that queries choose; weights: keys, core, filter."""
    (keys_PARNK, scale_PARN, merged_PANK), core_CARR, filter_PAR = weights
    tokens = query_BTPGRK.shape[0] * query_BTPGRK.shape[1]
    if merged_PANK is None or tokens > MERGED_TOKENS:
      return retrieval.retrieve(
        query_BTPGRK,
        keys_PARNK,
        self.config.top_m,
        core_CARR,
        filter_PAR,
        scale_PARN,
      )
    return retrieval.retrieve_merged(
      query_BTPGRK, keys_PARNK, merged_PANK, self.config.top_m, core_CARR
    )

  def _shuffle(self, row_BTAM, column_BTAM):
    """Returns the slots, in [0, U), of cells of the grid."""
    c = self.config
    if c.shuffle == "hash":
      return shuffle.hash_shuffle(
        row_BTAM, column_BTAM, c.grid_side, self.layer_index
      )
    cell_BTAM = row_BTAM * c.grid_side + column_BTAM
    if c.shuffle == "none":
      return cell_BTAM
    permutation = self.variable(
      "buffers",
      "permutation",
      lambda: shuffle.random_permutation(self.make_rng("params"), c.grid_side),
    ).value
    return permutation[cell_BTAM]

  def _tables(self):
    """Returns the layer's own tables, by name."""
    return tables_lib.value_tables(self, self.config, self.num_layers)

  def _read(self, x_BTD, slot_BTAM, score_BTAMC, tables):
    """Returns the projected sum [B, T, D] of the slots' rows times scores."""
    del x_BTD  # for kinds whose rows depend on the input
    c = self.config
    index_BTY = slot_BTAM.reshape(*slot_BTAM.shape[:2], -1)
    if c.projections == 1:
      index_BTY %= c.num_rows
    pooled_BTEW = tables_lib.pool_values(
      self,
      tables,
      "values",
      index_BTY,
      score_BTAMC.reshape(*index_BTY.shape, -1),
      c.projections,
    )
    return self._project(pooled_BTEW.astype(self.dtype))

  def _project(self, pooled_BTEW):
    """Projects [B, T, E, W] to [B, T, D]; E = 1 where all rows share one."""
    c = self.config
    if not c.value_projection:
      return pooled_BTEW.squeeze(-2)
    y_BTD = contract(
      self,
      "value_projection",
      pooled_BTEW,
      lambda: parameter(
        self,
        "value_projection",
        self._initializers()["value_projection"]
        if c.output != "zero"
        else nn.initializers.zeros,
        ("expansion", "value", "embed"),
        (c.projections, c.value_dim, self.embed_dim),
      ),
      num_axes=2,
    )
    if c.imported.projection_bias:
      y_BTD += parameter(
        self,
        "value_projection_bias",
        nn.initializers.zeros,
        ("embed",),
        (self.embed_dim,),
      ).astype(self.dtype)[None, None]
    return y_BTD
