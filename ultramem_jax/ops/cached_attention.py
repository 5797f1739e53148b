"""Attention over a decoding cache: reads the part in use, in blocks."""

import functools

import jax
import jax.numpy as jnp

# Cached positions read at a time, and bytes of keys: on a CPU what its cache
# keeps; an accelerator's loop costs more a step than reading unused positions.
CPU_BLOCK, CPU_BYTES = 128, 2**21
ACCELERATOR_BLOCK, ACCELERATOR_BYTES = 2048, 2**40
MASKED = -1e30  # a score that no softmax sees


def attend(query_BTQH, key_BQSH, value_BQSH, segment_BT, segment_BS, start):
  """Causal attention within segments of the positions in a cache.

  A softmax over blocks of cached positions, whose sums are rescaled as its
  maximum grows (Milakov and Gimelshein, arXiv 1805.02867). As many blocks are
  read as hold positions: what lies beyond them costs nothing.

  Args:
    query_BTQH: [B, T, Q, H] float, of the slots from start on.
    key_BQSH, value_BQSH: [B, Q, S, H], the cache with those slots written.
    segment_BT, segment_BS: [B, T] and [B, S] int32, the document of each.
    start: int32 scalar; T slots from it on are the newest.
  Returns:
    [B, T, Q, H] in the query's dtype.
  """
  arrays = (query_BTQH, key_BQSH, value_BQSH, segment_BT, segment_BS, start)
  return jax.lax.platform_dependent(
    *arrays,
    cpu=functools.partial(_attend_in_groups, CPU_BLOCK, CPU_BYTES),
    default=functools.partial(
      _attend_in_groups, ACCELERATOR_BLOCK, ACCELERATOR_BYTES
    ),
  )


def _attend_in_groups(block, budget, query_BTQH, *arrays):
  """Attends for as many rows of the batch at a time as budget holds."""
  *cache, start = arrays
  batch, heads, size, width = cache[0].shape
  block = min(block, size)
  row_bytes = heads * block * width * cache[0].dtype.itemsize
  group = max(
    rows
    for rows in range(1, batch + 1)
    if batch % rows == 0 and rows * row_bytes <= max(budget, row_bytes)
  )
  if block == size and query_BTQH.shape[1] == 1:
    group = batch  # A CPU reads a whole cache where it lies, and copies parts.
  attend_rows = functools.partial(_attend_in_blocks, block, group)
  if group == batch:
    return attend_rows(0, query_BTQH, *cache, start)

  def add_rows(index, y_BTQH):
    rows_BTQH = attend_rows(index * group, query_BTQH, *cache, start)
    return jax.lax.dynamic_update_slice_in_dim(
      y_BTQH, rows_BTQH, index * group, 0
    )

  return jax.lax.fori_loop(
    0, batch // group, add_rows, jnp.zeros_like(query_BTQH)
  )


def _attend_in_blocks(
  block,
  group,
  row,
  query_BTQH,
  key_BQSH,
  value_BQSH,
  segment_BT,
  segment_BS,
  start,
):
  """Attends for `group` rows of the batch from `row` on."""
  size = segment_BS.shape[1]
  query_BTQH, segment_BT, segment_BS = (
    jax.lax.dynamic_slice_in_dim(x, row, group)
    for x in (query_BTQH, segment_BT, segment_BS)
  )
  _, length, heads, width = query_BTQH.shape
  slot_T = start + jnp.arange(length)

  def add_block(index, sums):
    maximum_BQT, total_BQT, y_BQTH = sums
    # The last block of a cache that is no multiple of blocks begins earlier,
    # and leaves out what the one before it had.
    first = jnp.minimum(index * block, size - block)
    slot_S = first + jnp.arange(block)

    def take(x_BQSH):
      return jax.lax.dynamic_slice(
        x_BQSH, (row, 0, first, 0), (group, heads, block, width)
      )

    segment_B1S = jax.lax.dynamic_slice_in_dim(
      segment_BS, first, block, axis=1
    )[:, None]
    seen_BTS = (
      (segment_BT[:, :, None] == segment_B1S)
      & (slot_S[None, None] <= slot_T[None, :, None])
      & (slot_S[None, None] >= index * block)
    )
    score_BQTS = width**-0.5 * jnp.einsum(
      "BTQH,BQSH->BQTS",
      query_BTQH,
      take(key_BQSH),
      preferred_element_type=jnp.float32,
    )
    score_BQTS = jnp.where(seen_BTS[:, None], score_BQTS, MASKED)
    new_maximum_BQT = jnp.maximum(maximum_BQT, score_BQTS.max(-1))
    shrink_BQT = jnp.exp(maximum_BQT - new_maximum_BQT)
    weight_BQTS = jnp.exp(score_BQTS - new_maximum_BQT[..., None])
    added_BQTH = jnp.einsum(
      "BQTS,BQSH->BQTH",
      weight_BQTS.astype(value_BQSH.dtype),
      take(value_BQSH),
      preferred_element_type=jnp.float32,
    )
    return (
      new_maximum_BQT,
      shrink_BQT * total_BQT + weight_BQTS.sum(-1),
      shrink_BQT[..., None] * y_BQTH + added_BQTH,
    )

  sums = (
    jnp.full((group, heads, length), MASKED, jnp.float32),
    jnp.zeros((group, heads, length), jnp.float32),
    jnp.zeros((group, heads, length, width), jnp.float32),
  )
  if block == size:
    sums = add_block(0, sums)
  else:
    used = (start + length + block - 1) // block
    sums = jax.lax.fori_loop(0, used, add_block, sums)
  _, total_BQT, y_BQTH = sums
  y_BQTH /= total_BQT[..., None]
  return y_BQTH.swapaxes(1, 2).astype(query_BTQH.dtype)
