"""Attention over a decoding cache: reads the part in use, in chunks."""

import functools

import jax
import jax.numpy as jnp

# Cached positions read at a time, and bytes of their keys. A CPU keeps as much
# in its cache; on an accelerator a step of the loop costs more than reading
# unused positions.
CPU_CHUNK, CPU_BYTES = 128, 2**21
ACCELERATOR_CHUNK, ACCELERATOR_BYTES = 2048, 2**40
MASKED = -1e30  # a score that a softmax turns into 0


def attend(
  query_BTQH: jax.Array,
  key_BQSH: jax.Array,
  value_BQSH: jax.Array,
  segment_BT: jax.Array,
  segment_BS: jax.Array,
  start: jax.Array,
) -> jax.Array:
  """Computes causal attention within segments, over the positions in a cache.

  A softmax over chunks of cached positions, whose sums are rescaled as its
  maximum grows (Milakov and Gimelshein, arXiv 1805.02867). Only chunks that
  hold positions are read; the unused part of the cache costs nothing.

  Args:
    query_BTQH: [B, T, Q, H] float, of the cached positions from start on.
    key_BQSH, value_BQSH: [B, Q, S, H], the cache, with those positions written.
    segment_BT: [B, T] int32, the document of each query.
    segment_BS: [B, S] int32, the document of each cached position.
    start: int32 scalar; the T cached positions from it on are the newest.
  Returns:
    [B, T, Q, H] in the query's dtype.
  """
  arrays = (query_BTQH, key_BQSH, value_BQSH, segment_BT, segment_BS, start)
  return jax.lax.platform_dependent(
    *arrays,
    cpu=functools.partial(_attend_in_groups, CPU_CHUNK, CPU_BYTES),
    default=functools.partial(
      _attend_in_groups, ACCELERATOR_CHUNK, ACCELERATOR_BYTES
    ),
  )


def _attend_in_groups(
  chunk, budget, query_BTQH, key_BQSH, value_BQSH, segment_BT, segment_BS, start
):
  """Attends for as many sequences at a time as the budget in bytes holds."""
  batch, heads, size, width = key_BQSH.shape
  chunk = min(chunk, size)
  row_bytes = heads * chunk * width * key_BQSH.dtype.itemsize
  group = max(
    rows
    for rows in range(1, batch + 1)
    if batch % rows == 0 and rows * row_bytes <= max(budget, row_bytes)
  )
  if chunk == size and query_BTQH.shape[1] == 1:
    group = batch  # A CPU reads a whole cache in place, but copies parts.

  def attend_group(first):
    return _attend_in_chunks(
      chunk,
      group,
      first,
      query_BTQH,
      key_BQSH,
      value_BQSH,
      segment_BT,
      segment_BS,
      start,
    )

  if group == batch:
    return attend_group(0)

  def add_group(index, y_BTQH):
    rows_BTQH = attend_group(index * group)
    return jax.lax.dynamic_update_slice_in_dim(
      y_BTQH, rows_BTQH, index * group, 0
    )

  return jax.lax.fori_loop(
    0, batch // group, add_group, jnp.zeros_like(query_BTQH)
  )


def _attend_in_chunks(
  chunk,
  group,
  row,
  query_BTQH,
  key_BQSH,
  value_BQSH,
  segment_BT,
  segment_BS,
  start,
):
  """Attends for `group` sequences of the batch from `row` on."""
  query_BTQH, segment_BT, segment_BS = (
    jax.lax.dynamic_slice_in_dim(x, row, group)
    for x in (query_BTQH, segment_BT, segment_BS)
  )
  size, (_, length, heads, width) = segment_BS.shape[1], query_BTQH.shape
  place_T = start + jnp.arange(length)

  def add_chunk(index, sums):
    # Where chunks do not divide the cache, the last one begins earlier, and
    # masks the positions that the one before it had.
    first = jnp.minimum(index * chunk, size - chunk)
    place_S = first + jnp.arange(chunk)

    def take(x_BQSH):
      return jax.lax.dynamic_slice(
        x_BQSH, (row, 0, first, 0), (group, heads, chunk, width)
      )

    segment_B1S = jax.lax.dynamic_slice_in_dim(
      segment_BS, first, chunk, axis=1
    )[:, None]
    seen_BTS = (
      (segment_BT[:, :, None] == segment_B1S)
      & (place_S[None, None] <= place_T[None, :, None])
      & (place_S[None, None] >= index * chunk)
    )
    score_BQTS = width**-0.5 * jnp.einsum(
      "BTQH,BQSH->BQTS",
      query_BTQH,
      take(key_BQSH),
      preferred_element_type=jnp.float32,
    )
    score_BQTS = jnp.where(seen_BTS[:, None], score_BQTS, MASKED)
    return _add_to_softmax(sums, score_BQTS, take(value_BQSH))

  sums = (
    jnp.full((group, heads, length), MASKED, jnp.float32),
    jnp.zeros((group, heads, length), jnp.float32),
    jnp.zeros((group, heads, length, width), jnp.float32),
  )
  if chunk == size:
    sums = add_chunk(0, sums)
  else:
    used = (start + length + chunk - 1) // chunk
    sums = jax.lax.fori_loop(0, used, add_chunk, sums)
  _, total_BQT, y_BQTH = sums
  y_BQTH /= total_BQT[..., None]
  return y_BQTH.swapaxes(1, 2).astype(query_BTQH.dtype)


def _add_to_softmax(sums, score_BQTS, value_BQSH):
  """Adds scored values to the running sums of a softmax.

  Args:
    sums: (maximum_BQT, total_BQT, y_BQTH): the largest score so far; the sum of
      the weights, and of the weighted values, relative to that maximum.
    score_BQTS, value_BQSH: of a chunk.
  Returns:
    The new sums.
  """
  maximum_BQT, total_BQT, y_BQTH = sums
  new_maximum_BQT = jnp.maximum(maximum_BQT, score_BQTS.max(-1))
  shrink_BQT = jnp.exp(maximum_BQT - new_maximum_BQT)
  weight_BQTS = jnp.exp(score_BQTS - new_maximum_BQT[..., None])
  added_BQTH = jnp.einsum(
    "BQTS,BQSH->BQTH",
    weight_BQTS.astype(value_BQSH.dtype),
    value_BQSH,
    preferred_element_type=jnp.float32,
  )
  return (
    new_maximum_BQT,
    shrink_BQT * total_BQT + weight_BQTS.sum(-1),
    shrink_BQT[..., None] * y_BQTH + added_BQTH,
  )
