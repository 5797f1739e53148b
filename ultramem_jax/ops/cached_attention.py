"""Attention over a decoding cache: reads the part in use, in chunks."""

import functools

import jax
import jax.numpy as jnp

from ultramem_jax.ops.attention import MASKED, in_reach

# Cached positions read at a time, and bytes of their keys. A CPU keeps as much
# in its cache; on an accelerator a step of the loop costs more than reading
# unused positions.
CPU_CHUNK, CPU_BYTES = 128, 2**21
ACCELERATOR_CHUNK, ACCELERATOR_BYTES = 2048, 2**40


def attend(
  query_BTQH: jax.Array,
  key_BqSH: jax.Array,
  value_BqSH: jax.Array,
  segment_BT: jax.Array,
  segment_BS: jax.Array,
  start: jax.Array,
  window: int = 0,
) -> jax.Array:
  """Computes causal attention within segments, over the positions in a cache.

  A softmax over chunks of cached positions, whose sums are rescaled as its
  maximum grows (Milakov and Gimelshein, arXiv 1805.02867). Only chunks that
  hold positions that a query sees are read; the rest of the cache costs
  nothing.

  Args:
    query_BTQH: [B, T, Q, H] float, of the cached positions from start on.
    key_BqSH, value_BqSH: [B, q, S, H], the cache, with those positions written;
      q divides Q.
    segment_BT: [B, T] int32, the document of each query.
    segment_BS: [B, S] int32, the document of each cached position.
    start: int32 scalar; the T cached positions from it on are the newest.
    window: positions that a token sees, its own among them; 0: all.
  Returns:
    [B, T, Q, H] in the query's dtype.
  """
  arrays = (query_BTQH, key_BqSH, value_BqSH, segment_BT, segment_BS, start)
  return jax.lax.platform_dependent(
    *arrays,
    cpu=functools.partial(_attend_in_groups, CPU_CHUNK, CPU_BYTES, window),
    default=functools.partial(
      _attend_in_groups, ACCELERATOR_CHUNK, ACCELERATOR_BYTES, window
    ),
  )


def _attend_in_groups(
  chunk,
  budget,
  window,
  query_BTQH,
  key_BqSH,
  value_BqSH,
  segment_BT,
  segment_BS,
  start,
):
  """Attends for as many sequences at a time as the budget in bytes holds."""
  batch, kv_heads, size, width = key_BqSH.shape
  length = query_BTQH.shape[1]
  # The heads that share keys lie beside the positions.
  query_BqOTH = jnp.moveaxis(
    query_BTQH.reshape(batch, length, kv_heads, -1, width), 1, 3
  )
  chunk = min(chunk, size)
  row_bytes = kv_heads * chunk * width * key_BqSH.dtype.itemsize
  group = max(
    rows
    for rows in range(1, batch + 1)
    if batch % rows == 0 and rows * row_bytes <= max(budget, row_bytes)
  )
  if chunk == size and length == 1:
    group = batch  # A CPU reads a whole cache in place, but copies parts.

  def attend_group(first):
    return _attend_in_chunks(
      chunk,
      window,
      group,
      first,
      query_BqOTH,
      key_BqSH,
      value_BqSH,
      segment_BT,
      segment_BS,
      start,
    )

  def add_group(index, y_BqOTH):
    rows_BqOTH = attend_group(index * group)
    return jax.lax.dynamic_update_slice_in_dim(
      y_BqOTH, rows_BqOTH, index * group, 0
    )

  if group == batch:
    y_BqOTH = attend_group(0)
  else:
    y_BqOTH = jax.lax.fori_loop(
      0, batch // group, add_group, jnp.zeros_like(query_BqOTH)
    )
  return jnp.moveaxis(y_BqOTH, 3, 1).reshape(query_BTQH.shape)


def _attend_in_chunks(
  chunk,
  window,
  group,
  row,
  query_BqOTH,
  key_BqSH,
  value_BqSH,
  segment_BT,
  segment_BS,
  start,
):
  """Attends for `group` sequences of the batch from `row` on."""
  query_BqOTH, segment_BT, segment_BS = (
    jax.lax.dynamic_slice_in_dim(x, row, group)
    for x in (query_BqOTH, segment_BT, segment_BS)
  )
  _, kv_heads, _, length, width = query_BqOTH.shape
  size = segment_BS.shape[1]
  place_T = start + jnp.arange(length, dtype=jnp.int32)

  def add_chunk(index, sums):
    # Where chunks do not divide the cache, the last one begins earlier, and
    # masks the positions that the one before it had.
    first = jnp.minimum(index * chunk, size - chunk)
    place_s = first + jnp.arange(chunk, dtype=jnp.int32)

    def take(x_BqSH):
      return jax.lax.dynamic_slice(
        x_BqSH, (row, 0, first, 0), (group, kv_heads, chunk, width)
      )

    segment_B1s = jax.lax.dynamic_slice_in_dim(
      segment_BS, first, chunk, axis=1
    )[:, None]
    seen_BTs = (segment_BT[:, :, None] == segment_B1s) & in_reach(
      place_T, place_s, window
    )[None]
    seen_BTs &= (place_s >= index * chunk)[None, None]
    score_BqOTs = width**-0.5 * jnp.einsum(
      "BqOTH,BqsH->BqOTs",
      query_BqOTH,
      take(key_BqSH),
      preferred_element_type=jnp.float32,
    )
    score_BqOTs = jnp.where(seen_BTs[:, None, None], score_BqOTs, MASKED)
    return _add_to_softmax(sums, score_BqOTs, take(value_BqSH))

  shape = query_BqOTH.shape[:-1]
  sums = (
    jnp.full(shape, MASKED, jnp.float32),
    jnp.zeros(shape, jnp.float32),
    jnp.zeros((*shape, width), jnp.float32),
  )
  if chunk == size:
    sums = add_chunk(0, sums)
  else:
    oldest = jnp.maximum(start - window + 1, 0) // chunk if window else 0
    used = (start + length + chunk - 1) // chunk
    sums = jax.lax.fori_loop(oldest, used, add_chunk, sums)
  _, total_BqOT, y_BqOTH = sums
  return (y_BqOTH / total_BqOT[..., None]).astype(query_BqOTH.dtype)


def _add_to_softmax(sums, score_BqOTS, value_BqSH):
  """Adds scored values to the running sums of a softmax.

  Args:
    sums: (maximum_BqOT, total_BqOT, y_BqOTH): the largest score so far; the sum
      of the weights, and of the weighted values, relative to that maximum.
    score_BqOTS, value_BqSH: of a chunk.
  Returns:
    The new sums.
  """
  maximum_BqOT, total_BqOT, y_BqOTH = sums
  new_maximum_BqOT = jnp.maximum(maximum_BqOT, score_BqOTS.max(-1))
  shrink_BqOT = jnp.exp(maximum_BqOT - new_maximum_BqOT)
  weight_BqOTS = jnp.exp(score_BqOTS - new_maximum_BqOT[..., None])
  added_BqOTH = jnp.einsum(
    "BqOTS,BqSH->BqOTH",
    weight_BqOTS.astype(value_BqSH.dtype),
    value_BqSH,
    preferred_element_type=jnp.float32,
  )
  return (
    new_maximum_BqOT,
    shrink_BqOT * total_BqOT + weight_BqOTS.sum(-1),
    shrink_BqOT[..., None] * y_BqOTH + added_BqOTH,
  )
