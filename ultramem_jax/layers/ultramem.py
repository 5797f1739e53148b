"""The UltraMem layer (paper section 3): parameters, then the pure ops."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers import prepared
from ultramem_jax.layers import tables as tables_lib
from ultramem_jax.layers.convolution import CausalConv
from ultramem_jax.layers.linear import contract
from ultramem_jax.layers.norm import KeyNorm, make_norm
from ultramem_jax.layers.query import calibrated_query_weight, queries_read
from ultramem_jax.ops import retrieval, shuffle, tucker
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.memory import MemoryConfig

# Up to as many tokens merged keys are faster than the scores of all ranks: they
# are at 8, and not at 64 (`python -m benchmarks.inference --part=keys`).
MERGED_TOKENS = 8


class Keys(NamedTuple):
  """The keys of a layer, as its queries read them.

  keys_PARNK: [P, A, R, N, K] in the layer's dtype.
  scale_PARN: float32, factors of their scores; None where the keys are
    normalized.
  merged_PANK: keys folded with the filter vectors, where they were prepared.
  """

  keys_PARNK: jax.Array
  scale_PARN: jax.Array | None
  merged_PANK: jax.Array | None


class UltraMem(nn.Module):
  """Ultra-sparse memory: reads a few rows of a large table per token.

  y = sum_p W_p^T (sum of the selected rows of block p, each times its score),
  the rows found by product keys with a Tucker-decomposed score; `MemoryConfig`
  has the switches that turn parts off.

  Variables:
    params: `values` [I, W] the table; `keys` [P, A, R, N, K]; `core`
      [C, A, R, R]; `query` [D, P, G, R, K]; `value_projection` [E, W, D];
      `query_norm`, `key_norm` over K; `query_conv`.
    buffers: `u`, `t` [A, R], the filter vectors, to be refreshed once per
      training step by `refresh_buffers`; `permutation` [E * I] with the
      stored shuffle.
    cache: the convolution's last inputs, when decoding.
    prepared: arrays computed from parameters by `serve.prepare`, for a layer
      with `prepared_for`: `keys`, normalized; `merged_keys`, folded with u and
      t, where ranks share a query; for a CPU also `query` and
      `value_projection`, transposed.
  Sown when the collection is mutable:
    intermediates: `index_BTAM` (virtual, before the shuffle, best first),
      `slot_BTAM` (after the shuffle: row + I * block), `score_BTAMC` (after
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
    num_layers: L of the residual stream that the output joins: paper init
      gives the output the variance 1 / (2 L).
    layer_index: gives each layer of a model its own shuffle.
    dtype: of the matmuls; scores are float32 always.
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

  KIND = "ultramem"  # of its config
  # The authors initialize the weights of query and key norm with
  # K^-NORM_EXPONENT.
  NORM_EXPONENT = 0.33

  @nn.compact
  def __call__(self, x_BTD, segment_BT=None, decode: bool = False, tables=None):
    """Reads the memory.

    Args:
      x_BTD: [B, T, D] float.
      segment_BT: [B, T] int32, the document of each position (from 1); the
        convolution does not cross documents. 0 is padding, which the stats
        leave out. None: one document.
      decode: keep the convolution's history in the "cache" collection.
      tables: value tables by name, of a model whose layers share them; None:
        the layer has its own.
    Returns:
      [B, T, D] in `dtype`.
    Raises:
      ConfigError: the config is of another kind of memory, or its values are
        not as wide as D where nothing projects them.
      ValueError: x is not [B, T, D], or is empty; or segments are not [B, T].
    """
    c = self.config
    require(
      c.kind == self.KIND,
      "model.memory.kind",
      c.kind,
      f"must be {self.KIND!r} for a layer {type(self).__name__}",
    )
    c.require_width(self.embed_dim)
    if x_BTD.ndim != 3 or x_BTD.shape[-1] != self.embed_dim or not x_BTD.size:
      raise ValueError(
        f"x has shape {x_BTD.shape}: must be [B, T, {self.embed_dim}] with "
        "B and T at least 1"
      )
    if segment_BT is None:
      segment_BT = jnp.ones(x_BTD.shape[:2], jnp.int32)
    if segment_BT.shape != x_BTD.shape[:2]:
      raise ValueError(
        f"segment_BT has shape {segment_BT.shape}: must be [B, T] as x, "
        f"{x_BTD.shape[:2]}"
      )
    x_BTD = x_BTD.astype(self.dtype)
    core_CARR, filter_PAR = self._core()
    keys, fold = self._readable_keys(filter_PAR)
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
    if not self.is_initializing():
      self._sow(found, slot_BTAM, score_BTAMC, core_CARR, y_BTD, segment_BT)
    return y_BTD

  def _param(self, name, initializer, axes, shape):
    initializer = nn.with_logical_partitioning(initializer, axes)
    return self.param(name, initializer, shape)

  def _initializers(self):
    """Of keys, query and value projection."""
    c = self.config
    fan_in = {"paper": self.embed_dim, "official": c.key_dim}[c.init]
    return {
      "keys": nn.initializers.normal(c.key_dim**-0.5),
      "query": nn.initializers.normal(fan_in**-0.5),
      "value_projection": nn.initializers.normal(
        (c.projections * c.value_dim) ** -0.5
      ),
    }

  def _readable_keys(self, filter_PAR):
    """Returns `Keys`, and what to apply to queries before they score them."""
    as_is = lambda query_BTPGRK: query_BTPGRK
    if self.prepared_for is not None:
      return self._prepared_keys(filter_PAR), as_is
    raw_PARNK, norm = self._keys()
    if norm is not None and not norm.bias and self.dtype == jnp.float32:
      # Normalized keys would be another array of that size, and several in the
      # backward. In bfloat16 each form rounds differently, and a trained model
      # would choose other rows when served.
      scale_PARN = norm.inverse_std(raw_PARNK)
      return Keys(raw_PARNK.astype(self.dtype), scale_PARN, None), norm.fold
    return Keys(self._normalized_keys(raw_PARNK, norm), None, None), as_is

  def _normalized_keys(self, raw_PARNK, norm):
    keys_PARNK = raw_PARNK if norm is None else norm(raw_PARNK)
    return keys_PARNK.astype(self.dtype)

  def _prepared_keys(self, filter_PAR) -> Keys:
    """Returns the keys that `serve.prepare` normalized and merged."""
    keys_PARNK = prepared.read(
      self, "keys", lambda: self._normalized_keys(*self._keys())
    )
    c = self.config
    # A merged key in bfloat16 would be rounded, and choose other rows.
    if c.rank == 1 or c.query_per_rank or self.dtype != jnp.float32:
      return Keys(keys_PARNK, None, None)
    merged_PANK = prepared.read(
      self, "merged_keys", lambda: retrieval.merge_keys(keys_PARNK, filter_PAR)
    )
    return Keys(keys_PARNK, None, merged_PANK)

  def _keys(self):
    """Keys [P, A, R, N, K] in float32, and their `KeyNorm` or None."""
    c = self.config
    keys_PARNK = self._param(
      "keys",
      self._initializers()["keys"],
      ("side", "memory_heads", "rank", "keys", "key"),
      (2, c.num_heads, c.rank, c.grid_side, c.key_dim),
    )
    if c.query_key_norm == "none":
      return keys_PARNK, None
    exponent = 0.5 if c.init == "paper" else self.NORM_EXPONENT
    return keys_PARNK, KeyNorm(
      c.query_key_norm,
      c.norm_eps,
      c.imported.norm_bias,
      c.key_dim,
      nn.initializers.constant(c.key_dim**-exponent),
      name="key_norm",
    )

  def _core(self):
    """Core [C, A, R, R] and filter [P, A, R]; (None, None) for the sum."""
    c = self.config
    if c.score == "sum":
      return None, None
    core_CARR = self._param(
      "core",
      nn.initializers.uniform(1.0),
      ("cores", "memory_heads", "rank", "rank"),
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
    """Normalized queries [B, T, P, G, R, K], float32; G divides A."""
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
      lambda: self._param(
        "query",
        self._initializers()["query"],
        ("embed", *axes),
        (self.embed_dim, *outputs),
      ),
    )
    if c.imported.query_bias:
      query_BTPGRK += self._param(
        "query_bias", nn.initializers.zeros, axes, outputs
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
    return queries_read(c, query_BTPGRK)

  def _find(self, query_BTPGRK, weights):
    """The cells that the queries of some tokens choose."""
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
    """Slots in [0, E * I) of the grid's cells."""
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
    """The layer's own tables, by name."""
    return tables_lib.value_tables(self, self.config, self.num_layers)

  def _read(self, x_BTD, slot_BTAM, score_BTAMC, tables):
    """The sum of the rows at slots, each times its scores; [B, T, D]."""
    del x_BTD  # for layers whose rows depend on the input
    c = self.config
    index_BTK = slot_BTAM.reshape(*slot_BTAM.shape[:2], -1)
    if c.projections == 1:
      index_BTK %= c.num_rows
    pooled_BTEW = tables_lib.pool_rows(
      self,
      tables,
      "values",
      index_BTK,
      score_BTAMC.reshape(*index_BTK.shape, -1),
      c.projections,
    )
    return self._project(pooled_BTEW.astype(self.dtype))

  def _project(self, pooled_BTEW):
    """[B, T, E, W] -> [B, T, D]; E = 1 where one projection serves all."""
    c = self.config
    if not c.value_projection:
      return pooled_BTEW.squeeze(-2)
    y_BTD = contract(
      self,
      "value_projection",
      pooled_BTEW,
      lambda: self._param(
        "value_projection",
        self._initializers()["value_projection"],
        ("expansion", "value", "embed"),
        (c.projections, c.value_dim, self.embed_dim),
      ),
      num_axes=2,
    )
    if c.imported.projection_bias:
      y_BTD += self._param(
        "value_projection_bias",
        nn.initializers.zeros,
        ("embed",),
        (self.embed_dim,),
      ).astype(self.dtype)[None, None]
    return y_BTD

  def _sow(self, found, slot_BTAM, score_BTAMC, core_CARR, y_BTD, segment_BT):
    c = self.config
    index_BTAM = found.row_BTAM * c.grid_side + found.column_BTAM
    self.sow("intermediates", "index_BTAM", index_BTAM)
    self.sow("intermediates", "slot_BTAM", slot_BTAM)
    self.sow("intermediates", "score_BTAMC", score_BTAMC)
    present_BT1 = segment_BT[..., None] > 0
    total_BTAM = found.score_BTAMC.sum(-1)
    for name, rank in (("score_top_1", 0), ("score_top_m", -1)):
      mean = total_BTAM[..., rank].mean(where=present_BT1)
      self.sow("stats", name, mean)
    output_std = y_BTD.astype(jnp.float32).std(where=present_BT1)
    self.sow("stats", "output_std", output_std)
    if core_CARR is None or c.rank == 1:
      return
    self.sow(
      "losses",
      "auxiliary",
      tucker.auxiliary_loss(core_CARR, c.aux_loss_weight, c.aux_loss_margin),
    )
    lambda_AR = tucker.singular_values(core_CARR)
    self.sow(
      "stats", "core_lambda_ratio", (lambda_AR[:, 1] / lambda_AR[:, 0]).mean()
    )


def refresh_buffers(params, buffers):
  """The filter vectors u, t of every memory layer, from its current cores.

  To be called once per training step, before the forward; never in
  evaluation, which uses the vectors of the checkpoint. Of layers stacked by
  `nn.scan`: `jax.vmap(refresh_buffers)`.

  Args:
    params, buffers: the collections of a model that holds UltraMem layers, or
      of one such layer.
  Returns:
    buffers of the same structure, u and t replaced.
  """
  if "u" in buffers:
    # As `init` returns it, a parameter is in the box of its axes' names.
    core_CARR = nn.unbox(params["core"])
    u_AR, t_AR = tucker.refresh_filter(core_CARR, buffers["u"], buffers["t"])
    return {**buffers, "u": u_AR, "t": t_AR}
  return {
    name: refresh_buffers(params[name], child)
    if isinstance(child, dict)
    else child
    for name, child in buffers.items()
  }
