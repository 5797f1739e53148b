"""Causal attention within documents, in the form that suits the platform."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

MASKED = -1e30  # a score that a softmax turns into 0

# A CPU takes the queries in at most this many blocks, each with the keys up to
# its end, but in none smaller than this.
MAX_BLOCKS, MIN_BLOCK = 4, 64


def attend(
  query_BTQH: jax.Array,
  key_BTqH: jax.Array,
  value_BTqH: jax.Array,
  segment_BT: jax.Array,
  implementation: str = "xla",
  window: int = 0,
) -> jax.Array:
  """Returns softmax(Q K^T / sqrt(H)) V over earlier positions of the document.

  Where keys have fewer heads than queries, as many successive query heads share
  each (grouped queries: Ainslie et al., arXiv 2305.13245).

  Args:
    query_BTQH: [B, T, Q, H] float.
    key_BTqH, value_BTqH: [B, T, q, H], of the same dtype; q divides Q.
    segment_BT: [B, T] int32, the document of each position.
    implementation: of `jax.nn.dot_product_attention`, for accelerators;
      "cudnn" is for a GPU only.
    window: positions that a token sees, its own among them; 0: all.
  Returns:
    [B, T, Q, H] in the queries' dtype; the softmax is in float32.
  """
  at_once = functools.partial(_attend_at_once, implementation, window)
  inputs = query_BTQH, key_BTqH, value_BTqH, segment_BT
  if implementation != "xla":
    return at_once(*inputs)
  return jax.lax.platform_dependent(
    *inputs, cpu=functools.partial(_attend_in_blocks, window), default=at_once
  )


def may_read(segment_BT: jax.Array, window: int = 0) -> jax.Array:
  """Returns whether each position reads each other one, [B, T, T] bool."""
  place_T = jnp.arange(segment_BT.shape[1], dtype=jnp.int32)
  is_same_BTS = segment_BT[:, :, None] == segment_BT[:, None, :]
  return is_same_BTS & in_reach(place_T, place_T, window)[None]


def in_reach(place_T: jax.Array, place_S: jax.Array, window: int) -> jax.Array:
  """Returns whether places S are not after places T, and in their window.

  Args:
    place_T: [T] int32.
    place_S: [S] int32.
    window: positions that a token sees, its own among them; 0: all.
  Returns:
    [T, S] bool.
  """
  seen_TS = place_S[None] <= place_T[:, None]
  if window:
    seen_TS &= place_S[None] > place_T[:, None] - window
  return seen_TS


def _attend_at_once(
  implementation: Any, window: int, query_BTQH, key_BTqH, value_BTqH, segment_BT
):
  return jax.nn.dot_product_attention(
    query_BTQH,
    key_BTqH,
    value_BTqH,
    mask=may_read(segment_BT, window)[:, None],
    implementation=implementation,
  )


# On a CPU time goes into passes over the scores rather than matmuls. A block of
# queries leaves out the keys after it, and those before its window. The
# gradient computes the scores again, as FlashAttention does (Dao et al., arXiv
# 2205.14135): that is faster than to keep the probabilities, and the layers of
# a model share the only array of their size, the bias. The O query heads that
# share keys lie beside the positions: to a matmul they are more rows.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_in_blocks(window, query_BTQH, key_BTqH, value_BTqH, segment_BT):
  return _forward(window, query_BTQH, key_BTqH, value_BTqH, segment_BT)[0]


def _forward(window, query_BTQH, key_BTqH, value_BTqH, segment_BT):
  bias_B11TS = jnp.where(may_read(segment_BT, window), 0.0, MASKED)[
    :, None, None
  ]
  query_BqOTH = _grouped(query_BTQH, key_BTqH.shape[2])
  key_BqTH, value_BqTH = (x.swapaxes(1, 2) for x in (key_BTqH, value_BTqH))
  parts = []
  for block, seen in _blocks(segment_BT.shape[1], window):
    score_BqOtS = _scores(
      query_BqOTH[..., block, :],
      key_BqTH[:, :, seen],
      bias_B11TS[..., block, seen],
    )
    highest_BqOt1 = score_BqOtS.max(-1, keepdims=True)
    weight_BqOtS = jnp.exp(score_BqOtS - highest_BqOt1)
    sum_BqOt1 = weight_BqOtS.sum(-1, keepdims=True)
    y_BqOtH = _dot(weight_BqOtS, value_BqTH[:, :, seen], [4], [2]) / sum_BqOt1
    parts.append((y_BqOtH, highest_BqOt1 + jnp.log(sum_BqOt1)))
  y_BqOTH, log_sum_BqOT1 = (
    jnp.concatenate(x, axis=3) for x in zip(*parts, strict=True)
  )
  y_BTQH = _ungrouped(y_BqOTH).astype(query_BTQH.dtype)
  saved = query_BqOTH, key_BqTH, value_BqTH, bias_B11TS, y_BqOTH, log_sum_BqOT1
  return y_BTQH, saved


def _backward(window, saved, gradient_BTQH):
  query_BqOTH, key_BqTH, value_BqTH, bias_B11TS, y_BqOTH, log_sum_BqOT1 = saved
  length = key_BqTH.shape[2]
  gradient_BqOTH = _grouped(gradient_BTQH, key_BqTH.shape[1])
  # The part of the softmax's gradient that is the same for all keys.
  mean_BqOT1 = (gradient_BqOTH * y_BqOTH).sum(-1, keepdims=True)
  # For sums over queries, which multiply fastest as the last axis of a factor.
  query_BqHOT, gradient_BqHOT = (
    jnp.moveaxis(x, 4, 2) for x in (query_BqOTH, gradient_BqOTH)
  )
  query_parts = []
  shape = (*key_BqTH.shape[:2], key_BqTH.shape[3], length)
  key_sum_BqHT = value_sum_BqHT = jnp.zeros(shape, jnp.float32)
  for block, seen in _blocks(length, window):
    query_BqOtH, gradient_BqOtH = (
      x[..., block, :] for x in (query_BqOTH, gradient_BqOTH)
    )
    key_BqSH, value_BqSH = (x[:, :, seen] for x in (key_BqTH, value_BqTH))
    score_BqOtS = _scores(query_BqOtH, key_BqSH, bias_B11TS[..., block, seen])
    weight_BqOtS = jnp.exp(score_BqOtS - log_sum_BqOT1[..., block, :])
    change_BqOtS = _dot(gradient_BqOtH, value_BqSH, [4], [3])
    change_BqOtS = weight_BqOtS * (change_BqOtS - mean_BqOT1[..., block, :])
    query_parts.append(_dot(change_BqOtS, key_BqSH, [4], [2]))
    others = ((0, 0), (0, 0), (0, 0), (seen.start, length - seen.stop))
    key_sum_BqHT += jnp.pad(
      _dot(query_BqHOT[..., block], change_BqOtS, [3, 4], [2, 3]), others
    )
    value_sum_BqHT += jnp.pad(
      _dot(gradient_BqHOT[..., block], weight_BqOtS, [3, 4], [2, 3]), others
    )
  scale = query_BqOTH.shape[-1] ** -0.5
  gradients = (
    _ungrouped(scale * jnp.concatenate(query_parts, axis=3)),
    jnp.moveaxis(scale * key_sum_BqHT, 3, 1),
    jnp.moveaxis(value_sum_BqHT, 3, 1),
  )
  return *(x.astype(gradient_BTQH.dtype) for x in gradients), None


_attend_in_blocks.defvjp(_forward, _backward)


def _grouped(x_BTQH, kv_heads):
  """Returns [B, q, O, T, H]: for each head of keys, the O that share it."""
  batch, length, heads, width = x_BTQH.shape
  shape = batch, length, kv_heads, heads // kv_heads, width
  return jnp.moveaxis(x_BTQH.reshape(shape), 1, 3)


def _ungrouped(x_BqOTH):
  """Undoes `_grouped`: [B, T, Q, H]."""
  batch, _, _, length, width = x_BqOTH.shape
  return jnp.moveaxis(x_BqOTH, 3, 1).reshape(batch, length, -1, width)


def _blocks(length: int, window: int) -> list[tuple[slice, slice]]:
  """Returns, for each block, its positions and those that any of them sees."""
  size = max(math.ceil(length / MAX_BLOCKS), MIN_BLOCK)
  return [
    (
      slice(start, min(start + size, length)),
      slice(
        max(0, start - window + 1) if window else 0, min(start + size, length)
      ),
    )
    for start in range(0, length, size)
  ]


def _scores(query_BqOtH, key_BqSH, bias_B11tS):
  """Returns a block's scores [B, q, O, t, S], far below 0 where masked."""
  scale = query_BqOtH.shape[-1] ** -0.5
  return scale * _dot(query_BqOtH, key_BqSH, [4], [3]) + bias_B11tS


def _dot(x, y, x_axes, y_axes):
  """Contracts axes of x with axes of y, for each head of keys, in float32.

  The first factor is converted to the dtype of the second.
  """
  return jax.lax.dot_general(
    x.astype(y.dtype),
    y,
    ((x_axes, y_axes), ((0, 1), (0, 1))),
    preferred_element_type=jnp.float32,
  )
