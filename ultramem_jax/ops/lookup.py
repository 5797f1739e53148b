"""Lookup: pooled rows of the value table, with a custom gradient.

K is the number of rows a token reads, over all heads; U the width of a core's
slice of a row, W / C.
"""

import functools

import jax
import jax.numpy as jnp

from ultramem_jax.ops import blocks


def _gather(table_IW, row_BTK, num_cores):
  """The chosen rows as float32 [B, T, K, C, U]."""
  rows_BTKW = jnp.take(table_IW, row_BTK, axis=0, mode="clip")
  shape = (*row_BTK.shape, num_cores, table_IW.shape[1] // num_cores)
  return rows_BTKW.astype(jnp.float32).reshape(shape)


def _block_length(table_IW, row_BTK):
  batch, length, rows = row_BTK.shape
  return blocks.block_length(batch, length, 4 * rows * table_IW.shape[1])


def _one_hot(block_BTK, num_blocks):
  return jax.nn.one_hot(block_BTK, num_blocks, dtype=jnp.float32)


def pool_rows(table_IW, index_BTK, score_BTKC, num_blocks: int = 1):
  """Weighted sums of table rows, one for each block of implicit expansion.

    pooled[e, c] = sum over k with index[k] div I = e of
                   score[k, c] * table[index[k] mod I, slice c]

  Implicit value expansion pools here and projects after (paper section 3.4);
  multi-core scoring weights the c-th contiguous slice of a row by core c's
  own score (section 3.5). Gathers run in blocks of positions: nothing of
  [B, T, K, W] is ever held, forward or backward.

  Args:
    table_IW: [I, W] float; W divisible by C.
    index_BTK: [B, T, K] int32 in [0, E * I), K rows a token.
    score_BTKC: [B, T, K, C] float32.
    num_blocks: E.
  Returns:
    [B, T, E, W] float32. Differentiable in table and score.
  """
  block_BTK, row_BTK = jnp.divmod(index_BTK, table_IW.shape[0])
  return _pool(num_blocks, table_IW, row_BTK, block_BTK, score_BTKC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _pool(num_blocks, table_IW, row_BTK, block_BTK, score_BTKC):
  return _pool_forward(num_blocks, table_IW, row_BTK, block_BTK, score_BTKC)[0]


def _pool_forward(num_blocks, table_IW, row_BTK, block_BTK, score_BTKC):
  num_cores = score_BTKC.shape[-1]

  def pool_block(_, inputs):
    row_BTK, block_BTK, score_BTKC = inputs
    rows_BTKCU = _gather(table_IW, row_BTK, num_cores)
    weight_BTKEC = (
        _one_hot(block_BTK, num_blocks)[..., None] * score_BTKC[..., None, :]
    )
    pooled_BTECU = jnp.einsum("BTKEC,BTKCU->BTECU", weight_BTKEC, rows_BTKCU)
    return None, pooled_BTECU.reshape(*pooled_BTECU.shape[:3], -1)

  inputs = (row_BTK, block_BTK, score_BTKC)
  block = _block_length(table_IW, row_BTK)
  pooled_BTEW = blocks.scan_blocks(pool_block, None, inputs, block)[1]
  return pooled_BTEW, (table_IW, *inputs)


def _pool_backward(num_blocks, residuals, gradient_BTEW):
  table_IW, row_BTK, block_BTK, score_BTKC = residuals
  num_cores = score_BTKC.shape[-1]
  gradient_BTECU = gradient_BTEW.reshape(
      *gradient_BTEW.shape[:3], num_cores, -1
  )

  def backward_block(table_gradient_IW, inputs):
    row_BTK, block_BTK, score_BTKC, gradient_BTECU = inputs
    rows_BTKCU = _gather(table_IW, row_BTK, num_cores)
    gradient_BTKCU = jnp.einsum(
        "BTKE,BTECU->BTKCU", _one_hot(block_BTK, num_blocks), gradient_BTECU
    )
    score_gradient_BTKC = (rows_BTKCU * gradient_BTKCU).sum(-1)
    update_BTKCU = score_BTKC[..., None] * gradient_BTKCU
    update_BTKW = update_BTKCU.reshape(*row_BTK.shape, -1)
    table_gradient_IW = table_gradient_IW.at[row_BTK].add(
        update_BTKW.astype(table_IW.dtype), mode="promise_in_bounds"
    )
    return table_gradient_IW, score_gradient_BTKC

  inputs = (row_BTK, block_BTK, score_BTKC, gradient_BTECU)
  table_gradient_IW, score_gradient_BTKC = blocks.scan_blocks(
      backward_block, jnp.zeros_like(table_IW), inputs,
      _block_length(table_IW, row_BTK),
  )
  return table_gradient_IW, None, None, score_gradient_BTKC


_pool.defvjp(_pool_forward, _pool_backward)


def pool_rows_reference(table_IW, index_BTK, score_BTKC, num_blocks: int = 1):
  """`pool_rows` from the definition: slow, plain, no custom gradient."""
  num_rows, width = table_IW.shape
  num_cores = score_BTKC.shape[-1]
  weight_BTKW = jnp.repeat(score_BTKC, width // num_cores, axis=-1)
  weighted_BTKW = weight_BTKW * table_IW[index_BTK % num_rows]
  pooled = [
      jnp.where((index_BTK // num_rows == block)[..., None], weighted_BTKW, 0)
      .sum(-2)
      for block in range(num_blocks)
  ]
  return jnp.stack(pooled, axis=-2)


@jax.custom_vjp
def dot_rows(table_IW, index_BTK, x_BTW):
  """Inner products of chosen table rows with each position's own vector.

    out[k] = <table[index[k]], x>

  Runs in blocks of positions like `pool_rows`.

  Args:
    table_IW: [I, W] float.
    index_BTK: [B, T, K] int32 in [0, I).
    x_BTW: [B, T, W] float.
  Returns:
    [B, T, K] float32. Differentiable in table and x.
  """
  return _dot_forward(table_IW, index_BTK, x_BTW)[0]


def _dot_forward(table_IW, index_BTK, x_BTW):

  def dot_block(_, inputs):
    index_BTK, x_BTW = inputs
    rows_BTKW = _gather(table_IW, index_BTK, 1)[..., 0, :]
    return None, jnp.einsum(
        "BTKW,BTW->BTK", rows_BTKW, x_BTW.astype(jnp.float32)
    )

  inputs = (index_BTK, x_BTW)
  block = _block_length(table_IW, index_BTK)
  out_BTK = blocks.scan_blocks(dot_block, None, inputs, block)[1]
  return out_BTK, (table_IW, *inputs)


def _dot_backward(residuals, gradient_BTK):
  table_IW, index_BTK, x_BTW = residuals

  def backward_block(table_gradient_IW, inputs):
    index_BTK, x_BTW, gradient_BTK = inputs
    rows_BTKW = _gather(table_IW, index_BTK, 1)[..., 0, :]
    x_gradient_BTW = jnp.einsum("BTK,BTKW->BTW", gradient_BTK, rows_BTKW)
    update_BTKW = gradient_BTK[..., None] * x_BTW[..., None, :]
    table_gradient_IW = table_gradient_IW.at[index_BTK].add(
        update_BTKW.astype(table_IW.dtype), mode="promise_in_bounds"
    )
    return table_gradient_IW, x_gradient_BTW.astype(x_BTW.dtype)

  table_gradient_IW, x_gradient_BTW = blocks.scan_blocks(
      backward_block, jnp.zeros_like(table_IW),
      (index_BTK, x_BTW, gradient_BTK), _block_length(table_IW, index_BTK),
  )
  return table_gradient_IW, None, x_gradient_BTW


dot_rows.defvjp(_dot_forward, _dot_backward)


def dot_rows_reference(table_IW, index_BTK, x_BTW):
  """`dot_rows` from the definition: slow, plain, no custom gradient."""
  return (table_IW[index_BTK] * x_BTW[..., None, :]).sum(-1)
