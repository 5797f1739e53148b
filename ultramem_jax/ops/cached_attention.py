"""Attention over a decoding cache: reads the part in use, in blocks."""

import functools

import jax
import jax.numpy as jnp

# Cached positions read at a time. On a CPU a block stays in cache; on an
# accelerator a loop's step costs more than reading unused positions.
CPU_BLOCK = 128
ACCELERATOR_BLOCK = 2048
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
      cpu=functools.partial(_attend_in_blocks, CPU_BLOCK),
      default=functools.partial(_attend_in_blocks, ACCELERATOR_BLOCK),
  )


def _attend_in_blocks(
    block, query_BTQH, key_BQSH, value_BQSH, segment_BT, segment_BS, start
):
  batch, length, heads, width = query_BTQH.shape
  size = segment_BS.shape[1]
  block = min(block, size)
  slot_T = start + jnp.arange(length)

  def add_block(index, sums):
    maximum_BQT, total_BQT, y_BQTH = sums
    # The last block of a cache that is no multiple of blocks begins earlier,
    # and leaves out what the one before it had.
    first = jnp.minimum(index * block, size - block)
    slot_S = first + jnp.arange(block)
    take = functools.partial(
        jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=block
    )
    segment_B1S = take(segment_BS, axis=1)[:, None, :]
    seen_BTS = (
        (segment_BT[:, :, None] == segment_B1S)
        & (slot_S[None, None] <= slot_T[None, :, None])
        & (slot_S[None, None] >= index * block)
    )
    score_BQTS = width**-0.5 * jnp.einsum(
        "BTQH,BQSH->BQTS", query_BTQH, take(key_BQSH, axis=2),
        preferred_element_type=jnp.float32,
    )
    score_BQTS = jnp.where(seen_BTS[:, None], score_BQTS, MASKED)
    new_maximum_BQT = jnp.maximum(maximum_BQT, score_BQTS.max(-1))
    shrink_BQT = jnp.exp(maximum_BQT - new_maximum_BQT)
    weight_BQTS = jnp.exp(score_BQTS - new_maximum_BQT[..., None])
    added_BQTH = jnp.einsum(
        "BQTS,BQSH->BQTH", weight_BQTS.astype(value_BQSH.dtype),
        take(value_BQSH, axis=2), preferred_element_type=jnp.float32,
    )
    return (
        new_maximum_BQT,
        shrink_BQT * total_BQT + weight_BQTS.sum(-1),
        shrink_BQT[..., None] * y_BQTH + added_BQTH,
    )

  sums = (
      jnp.full((batch, heads, length), MASKED, jnp.float32),
      jnp.zeros((batch, heads, length), jnp.float32),
      jnp.zeros((batch, heads, length, width), jnp.float32),
  )
  if block == size:
    sums = add_block(0, sums)
  else:
    used = (start + length + block - 1) // block
    sums = jax.lax.fori_loop(0, used, add_block, sums)
  _, total_BQT, y_BQTH = sums
  y_BQTH /= total_BQT[..., None]
  return y_BQTH.swapaxes(1, 2).astype(query_BTQH.dtype)
