"""Queries of a memory: which head reads which, and their scale at the start."""

import functools

import jax
import jax.numpy as jnp

from ultramem_jax.ops import random, retrieval
from ultramem_jax.ops.cpu import top_k
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.memory import MemoryConfig

# Random queries with which the query norm is calibrated: they give the mean
# square of the chosen scores to about 1 %.
CALIBRATION_QUERIES = 256


def spread_queries(config: MemoryConfig, query_BTPGRK: jax.Array) -> jax.Array:
  """Returns queries over which the heads divide evenly.

  Head a reads query a // heads_per_query. If that leaves a query with fewer
  heads than another, or with none, each head gets its own copy.

  Args:
    config: of the layer.
    query_BTPGRK: [B, T, P, G, R, K], `config.num_queries` of them.
  """
  heads, share = config.num_heads, config.heads_per_query
  if config.num_queries * share == heads:
    return query_BTPGRK
  return query_BTPGRK[:, :, :, jnp.arange(heads, dtype=jnp.int32) // share]


# Traced once for all memories of a shape, and compiled in little time: it is
# most of an initialization, and runs once.
_retrieve = jax.jit(
  functools.partial(retrieval.retrieve, choose=top_k.by_xla), static_argnums=2
)


def calibrated_query_weight(
  config: MemoryConfig,
  key: jax.Array,
  raw_keys_PARNK: jax.Array,
  core_CARR: jax.Array | None,
  filter_PAR: jax.Array | None,
  layout: Layout | None,
) -> jax.Array:
  """Returns the query-norm weight that gives chosen scores a mean square of 1.

  Retrieves for random unit-variance queries with weight 1 and solves for the
  weight, in which a score is quadratic under Tucker scoring (both sides carry
  it) and linear for the sum. The mean square is that of each core's scores: a
  mean total score of 1 over C cores, which the paper's 1 / sqrt(E[Y]) aims at,
  would leave the layer's output variance several times too small.

  Args:
    config: of a layer with init = "paper".
    key: PRNG key of the random queries.
    raw_keys_PARNK, core_CARR, filter_PAR: the initial parameters.
    layout: splits the random queries over devices.
  Returns:
    float32 scalar.
  """
  c = config
  sample_BTPGRK = random.normal(
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
  sample_BTPGRK = spread_queries(c, sample_BTPGRK)
  found = layout_lib.over_tokens(
    lambda query, weights: _retrieve(query, weights[0], c.top_m, *weights[1:]),
    _standardize(c, sample_BTPGRK),
    (_standardize(c, raw_keys_PARNK) * c.key_dim**-0.5, core_CARR, filter_PAR),
    layout,
  )
  degree = 2 if c.score == "tucker" else 1
  return jnp.square(found.score_BTAMC).mean() ** (-0.5 / degree)


def _standardize(config: MemoryConfig, x: jax.Array) -> jax.Array:
  """Normalizes the last axis with weight 1."""
  if config.query_key_norm == "rms":
    mean_square = jnp.square(x).mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + config.norm_eps)
  return jax.nn.standardize(x, epsilon=config.norm_eps)
