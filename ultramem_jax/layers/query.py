"""Queries of a memory: what they are made from, who reads them, their scale."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.ops import retrieval
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded.layout import Layout

# Random queries of the Monte-Carlo that calibrates the query norm: the mean
# square of the selected scores is then known to about 1 %.
CALIBRATION_QUERIES = 256


class CausalConv(nn.Module):
  """Causal depthwise convolution: y[t] = sum_j w[j] * x[t - j], j < taps.

  A tap reaches only positions of its own segment. In decoding, the last
  taps - 1 inputs are kept in the "cache" collection.
  """

  taps: int

  @nn.compact
  def __call__(self, x_BTD, segment_BT, decode: bool):
    batch, length, width = x_BTD.shape
    past = self.taps - 1
    kernel_init = nn.initializers.normal(self.taps**-0.5)
    kernel_JD = self.param(
      "kernel",
      nn.with_logical_partitioning(kernel_init, (None, "embed")),
      (self.taps, width),
    )
    history_BTD = jnp.zeros((batch, past, width), x_BTD.dtype)
    history_BT = jnp.zeros((batch, past), jnp.int32)
    if decode:
      is_initialized = self.has_variable("cache", "input")
      cached_BTD = self.variable("cache", "input", lambda: history_BTD)
      cached_BT = self.variable("cache", "segment", lambda: history_BT)
      history_BTD, history_BT = cached_BTD.value, cached_BT.value
    x_BTD = jnp.concatenate([history_BTD, x_BTD], axis=1)
    segment_BT = jnp.concatenate([history_BT, segment_BT], axis=1)
    if decode and is_initialized:
      cached_BTD.value = x_BTD[:, length:]
      cached_BT.value = segment_BT[:, length:]
    y_BTD = 0
    for tap in range(self.taps):
      window = slice(past - tap, past - tap + length)
      same_BT1 = (segment_BT[:, window] == segment_BT[:, past:])[..., None]
      tap_11D = kernel_JD[None, None, tap].astype(x_BTD.dtype)
      y_BTD += jnp.where(same_BT1, x_BTD[:, window], 0) * tap_11D
    return y_BTD


def queries_read(config, query_BTPGRK):
  """Queries such that the heads divide evenly over them.

  Head a reads query a // heads_per_query. Where that leaves a query with
  fewer heads than another, or with none, each head gets its own copy.
  """
  heads, share = config.num_heads, config.heads_per_query
  if config.num_queries * share == heads:
    return query_BTPGRK
  return query_BTPGRK[:, :, :, jnp.arange(heads) // share]


# Traced once for all memories of a shape: it is most of an initialization.
_retrieve = jax.jit(retrieval.retrieve, static_argnums=2)


def calibrated_query_weight(
  config, key, raw_keys_PARNK, core_CARR, filter_PAR, layout: Layout | None
):
  """The query-norm weight that gives selected scores a mean square of 1.

  Retrieves for random unit-variance queries with weight 1 and solves for the
  weight, in which a score is quadratic under Tucker scoring (both sides carry
  it) and linear for the sum. Per core: with C cores a mean total score of 1,
  which the paper's 1 / sqrt(E[Y]) aims at, would leave the layer's output
  variance several times too small.

  Args:
    config: MemoryConfig with init = "paper".
    key: PRNG key of the random queries.
    raw_keys_PARNK, core_CARR, filter_PAR: the initial parameters.
    layout: splits the random queries over devices.
  Returns:
    float32 scalar.
  """
  c = config
  sample_BTPGRK = jax.random.normal(
    key,
    (
      1,
      CALIBRATION_QUERIES,
      2,
      c.num_queries,
      c.rank if c.query_per_rank else 1,
      c.key_dim,
    ),
  )
  sample_BTPGRK = queries_read(c, sample_BTPGRK)
  standardize = jax.nn.standardize
  if c.query_key_norm == "rms":

    def standardize(x, epsilon):
      return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + epsilon)

  found = layout_lib.over_tokens(
    lambda query, weights: _retrieve(query, weights[0], c.top_m, *weights[1:]),
    standardize(sample_BTPGRK, epsilon=c.norm_eps),
    (
      standardize(raw_keys_PARNK, epsilon=c.norm_eps) * c.key_dim**-0.5,
      core_CARR,
      filter_PAR,
    ),
    layout,
  )
  degree = 2 if c.score == "tucker" else 1
  return jnp.square(found.score_BTAMC).mean() ** (-0.5 / degree)
