"""Causal attention within documents, in the form that suits the platform."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

# A CPU takes the queries in so many blocks, each with the keys up to its end,
# but in none smaller than this.
MAX_BLOCKS, MIN_BLOCK = 4, 64


def attend(
  query_BTQH: jax.Array,
  key_BTQH: jax.Array,
  value_BTQH: jax.Array,
  segment_BT: jax.Array,
  implementation: str = "xla",
) -> jax.Array:
  """Returns softmax(Q K^T / sqrt(H)) V over earlier positions of the document.

  Args:
    query_BTQH, key_BTQH, value_BTQH: [B, T, Q, H] float, of one dtype.
    segment_BT: [B, T] int32, the document of each position.
    implementation: of `jax.nn.dot_product_attention`, for accelerators;
      "cudnn" is for a GPU only.
  Returns:
    [B, T, Q, H] in the queries' dtype; the softmax is in float32.
  """
  at_once = functools.partial(_attend_at_once, implementation)
  inputs = query_BTQH, key_BTQH, value_BTQH, segment_BT
  if implementation != "xla":
    return at_once(*inputs)
  return jax.lax.platform_dependent(
    *inputs, cpu=_attend_in_blocks, default=at_once
  )


def may_read(segment_BT: jax.Array) -> jax.Array:
  """Returns whether each position reads each other one, [B, T, T] bool."""
  place_T = jnp.arange(segment_BT.shape[1])
  is_same_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
  return is_same_BTS & (place_T[:, None] >= place_T[None])[None]


def _attend_at_once(
  implementation: Any, query_BTQH, key_BTQH, value_BTQH, segment_BT
):
  return jax.nn.dot_product_attention(
    query_BTQH,
    key_BTQH,
    value_BTQH,
    mask=may_read(segment_BT)[:, None],
    implementation=implementation,
  )


# On a CPU time goes into passes over the scores rather than matmuls. A block of
# queries leaves out the keys after it. The gradient computes the scores again,
# as FlashAttention does (Dao et al., arXiv 2205.14135): that is faster than to
# keep the probabilities, and the layers of a model share the only array of
# their size, the bias.


@jax.custom_vjp
def _attend_in_blocks(query_BTQH, key_BTQH, value_BTQH, segment_BT):
  return _forward(query_BTQH, key_BTQH, value_BTQH, segment_BT)[0]


def _forward(query_BTQH, key_BTQH, value_BTQH, segment_BT):
  bias_B1TS = jnp.where(may_read(segment_BT), 0.0, -1e30)[:, None]
  query_BQTH, key_BQTH, value_BQTH = (
    x.swapaxes(1, 2) for x in (query_BTQH, key_BTQH, value_BTQH)
  )
  parts = []
  for block, until in _blocks(segment_BT.shape[1]):
    score_BQtS = _scores(
      query_BQTH[:, :, block], key_BQTH[:, :, until], bias_B1TS[:, :, block]
    )
    highest_BQt1 = score_BQtS.max(-1, keepdims=True)
    weight_BQtS = jnp.exp(score_BQtS - highest_BQt1)
    sum_BQt1 = weight_BQtS.sum(-1, keepdims=True)
    y_BQtH = _dot(weight_BQtS, value_BQTH[:, :, until], (3, 2)) / sum_BQt1
    parts.append((y_BQtH, highest_BQt1 + jnp.log(sum_BQt1)))
  y_BQTH, log_sum_BQT1 = (
    jnp.concatenate(x, axis=2) for x in zip(*parts, strict=True)
  )
  y_BTQH = y_BQTH.swapaxes(1, 2).astype(query_BTQH.dtype)
  saved = query_BQTH, key_BQTH, value_BQTH, bias_B1TS, y_BQTH, log_sum_BQT1
  return y_BTQH, saved


def _backward(saved, gradient_BTQH):
  query_BQTH, key_BQTH, value_BQTH, bias_B1TS, y_BQTH, log_sum_BQT1 = saved
  gradient_BQTH = gradient_BTQH.swapaxes(1, 2)
  # The part of the softmax's gradient that is the same for all keys.
  mean_BQT1 = (gradient_BQTH * y_BQTH).sum(-1, keepdims=True)
  # For sums over queries, which multiply fastest as the last axis of a factor.
  query_BQHT, gradient_BQHT = (
    x.swapaxes(2, 3) for x in (query_BQTH, gradient_BQTH)
  )
  query_parts = []
  key_sum_BQHT = value_sum_BQHT = jnp.zeros(query_BQHT.shape, jnp.float32)
  for block, until in _blocks(query_BQTH.shape[2]):
    query_BQtH, gradient_BQtH = (
      x[:, :, block] for x in (query_BQTH, gradient_BQTH)
    )
    key_BQSH, value_BQSH = (x[:, :, until] for x in (key_BQTH, value_BQTH))
    score_BQtS = _scores(query_BQtH, key_BQSH, bias_B1TS[:, :, block])
    weight_BQtS = jnp.exp(score_BQtS - log_sum_BQT1[:, :, block])
    change_BQtS = _dot(gradient_BQtH, value_BQSH, (3, 3))
    change_BQtS = weight_BQtS * (change_BQtS - mean_BQT1[:, :, block])
    query_parts.append(_dot(change_BQtS, key_BQSH, (3, 2)))
    later = ((0, 0), (0, 0), (0, 0), (0, key_BQTH.shape[2] - until.stop))
    key_sum_BQHT += jnp.pad(
      _dot(query_BQHT[..., block], change_BQtS, (3, 2)), later
    )
    value_sum_BQHT += jnp.pad(
      _dot(gradient_BQHT[..., block], weight_BQtS, (3, 2)), later
    )
  scale = query_BQTH.shape[-1] ** -0.5
  gradients = (
    scale * jnp.concatenate(query_parts, axis=2),
    scale * key_sum_BQHT.swapaxes(2, 3),
    value_sum_BQHT.swapaxes(2, 3),
  )
  return (
    *(x.swapaxes(1, 2).astype(gradient_BTQH.dtype) for x in gradients),
    None,
  )


_attend_in_blocks.defvjp(_forward, _backward)


def _blocks(length: int) -> list[tuple[slice, slice]]:
  """Returns the positions of each block, and those up to its end."""
  size = max(math.ceil(length / MAX_BLOCKS), MIN_BLOCK)
  ends = [min(start + size, length) for start in range(0, length, size)]
  starts = range(0, length, size)
  return [
    (slice(start, end), slice(0, end))
    for start, end in zip(starts, ends, strict=True)
  ]


def _scores(query_BQtH, key_BQSH, bias_B1tT):
  """Returns a block's scores [B, Q, t, S], far below 0 where masked."""
  scale = query_BQtH.shape[-1] ** -0.5
  score_BQtS = _dot(query_BQtH, key_BQSH, (3, 3))
  return scale * score_BQtS + bias_B1tT[..., : score_BQtS.shape[-1]]


def _dot(x, y, axes):
  """Contracts an axis of x with one of y, for each head, in float32.

  The first factor is converted to the dtype of the second.
  """
  x_axis, y_axis = axes
  return jax.lax.dot_general(
    x.astype(y.dtype),
    y,
    (((x_axis,), (y_axis,)), ((0, 1), (0, 1))),
    preferred_element_type=jnp.float32,
  )
