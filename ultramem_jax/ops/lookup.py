"""Lookup: pooled rows of the value table, with a custom gradient.

K is the number of rows a token reads, over all heads; U the width of a core's
slice of a row, W / C.

Tables are float, or low precision stored as integers: uint16 is the bits of
bfloat16, which XLA's CPU compiler would convert to float32 as a whole before
a loop that reads them; int8 is a number times a scale of the caller's. The
integers have no gradient (float0).
"""

import functools
import math

import jax
import jax.numpy as jnp

from ultramem_jax.ops import blocks, precision
from ultramem_jax.settings.checks import require

# Rows that one pass over the pooled vectors reads at most, on a CPU. From
# about 12 on the memory's bandwidth is reached.
ROWS_PER_PASS = 21


def pool_rows(
  table_IW, index_BTK, score_BTKC, num_blocks: int = 1, kernel: str = "xla"
):
  """Weighted sums of table rows, one for each block of implicit expansion.

    pooled[e, c] = sum over k with index[k] div I = e of
                   score[k, c] * table[index[k] mod I, slice c]

  Implicit value expansion pools here and projects after (paper section 3.4);
  multi-core scoring weights the c-th contiguous slice of a row by core c's
  own score (section 3.5). Gathers run in blocks of positions: nothing of
  [B, T, K, W] is ever held, forward or backward.

  Args:
    table_IW: [I, W] float, uint16 (bits of bfloat16) or int8; W divisible
      by C.
    index_BTK: [B, T, K] int32 in [0, E * I), K rows a token.
    score_BTKC: [B, T, K, C] float32.
    num_blocks: E.
    kernel: "pallas" reads tables by `lookup_gpu` on an NVIDIA GPU, by
      `lookup_tpu` on a TPU, if it takes them.
  Returns:
    [B, T, E, W] float32. Differentiable in table, if float, and score.
  """
  if num_blocks == 1:
    block_BTK, row_BTK = jnp.zeros_like(index_BTK), index_BTK
  else:
    block_BTK, row_BTK = jnp.divmod(index_BTK, table_IW.shape[0])
  return _pool(num_blocks, kernel, table_IW, row_BTK, block_BTK, score_BTKC)


def dot_rows(table_IW, index_BTK, x_BTW, kernel: str = "xla"):
  """Inner products of chosen table rows with each position's own vector.

    out[k] = <table[index[k]], x>

  Runs in blocks of positions like `pool_rows`.

  Args:
    table_IW: [I, W] float, uint16 (bits of bfloat16) or int8.
    index_BTK: [B, T, K] int32 in [0, I).
    x_BTW: [B, T, W] float.
    kernel: see `pool_rows`.
  Returns:
    [B, T, K] float32. Differentiable in table, if float, and x.
  """
  x_BTEW = x_BTW.astype(jnp.float32)[:, :, None]
  block_BTK = jnp.zeros_like(index_BTK)
  return _dot(1, kernel, table_IW, index_BTK, block_BTK, x_BTEW)[..., 0]


# The two are each other's gradients: of `_pool` in the scores it is `_dot`,
# and the reverse. Gradients of scores and table are two loops, so that the
# table's is dead code where it is not asked for.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pool(num_blocks, kernel, table_IW, row_BTK, block_BTK, score_BTKC):
  """[B, T, E, W]: the sum of each block's rows times their scores."""
  return jax.lax.platform_dependent(
    table_IW,
    row_BTK,
    block_BTK,
    score_BTKC,
    cpu=functools.partial(_pool_in_turn, num_blocks),
    default=functools.partial(_pool_at_once, num_blocks),
    **_kernel_branches(
      kernel, "pool", num_blocks, table_IW, score_BTKC.shape[-1]
    ),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(num_cores, kernel, table_IW, row_BTK, block_BTK, x_BTEW):
  """[B, T, K, C]: slices of rows times those of their blocks' vectors."""

  def dot(of_block, budget, table_IW, *inputs):
    def dot_block(_, inputs):
      row_BTK, block_BTK, x_BTEW = inputs
      product_BTKW = _gather(table_IW, row_BTK) * of_block(block_BTK, x_BTEW)
      # A product with ones, since into a sum XLA would fuse the gather, and
      # then read and add on a CPU number by number.
      product_BTKCU = _split(product_BTKW, num_cores)
      ones_U = jnp.ones(product_BTKCU.shape[-1:], jnp.float32)
      return None, jnp.einsum(
        "BTKCU,U->BTKC", product_BTKCU, ones_U, precision=precision.EXACT
      )

    block = _block_length(budget, table_IW, inputs[0])
    return blocks.scan_blocks(dot_block, None, inputs, block)[1]

  return _by_platform(
    dot,
    table_IW,
    row_BTK,
    block_BTK,
    x_BTEW,
    **_kernel_branches(kernel, "dot", num_cores, table_IW, num_cores),
  )


def _kernel_branches(kernel, op, count, table_IW, num_cores):
  """The op of each platform's kernel that takes the table, if asked for.

  Raises:
    ConfigError: asked for, but the kernel of this machine's accelerator, or
      without one every kernel, does not take such tables.
  """
  if kernel == "xla":
    return {}
  # Only here, because Pallas takes long to import.
  from ultramem_jax.ops.kernels import gpu, tpu

  kernels = {"cuda": gpu, "tpu": tpu}
  branches = {
    platform: functools.partial(getattr(module, op), count)
    for platform, module in kernels.items()
    if module.takes(table_IW, num_cores)
  }
  here = {"gpu": "cuda", "tpu": "tpu"}.get(jax.default_backend())
  require(
    here in branches if here else branches,
    "model.memory.storage.kernel",
    kernel,
    f"takes tables, {gpu.TABLES}, {tpu.TABLES}; not one of "
    f"{table_IW.dtype} and {table_IW.shape[1]} columns for {num_cores} cores",
  )
  return branches


def _pool_forward(num_blocks, kernel, *inputs):
  return _pool(num_blocks, kernel, *inputs), inputs


def _pool_backward(num_blocks, kernel, residuals, gradient_BTEW):
  del num_blocks
  table_IW, row_BTK, block_BTK, score_BTKC = residuals
  num_cores = score_BTKC.shape[-1]
  return (
    _table_gradient(*residuals, gradient_BTEW),
    None,
    None,
    _dot(num_cores, kernel, table_IW, row_BTK, block_BTK, gradient_BTEW),
  )


def _dot_forward(num_cores, kernel, *inputs):
  return _dot(num_cores, kernel, *inputs), inputs


def _dot_backward(num_cores, kernel, residuals, gradient_BTKC):
  del num_cores
  table_IW, row_BTK, block_BTK, x_BTEW = residuals
  num_blocks = x_BTEW.shape[2]
  return (
    _table_gradient(table_IW, row_BTK, block_BTK, gradient_BTKC, x_BTEW),
    None,
    None,
    _pool(num_blocks, kernel, table_IW, row_BTK, block_BTK, gradient_BTKC),
  )


_pool.defvjp(_pool_forward, _pool_backward)
_dot.defvjp(_dot_forward, _dot_backward)


def _table_gradient(table_IW, *inputs):
  """Of the sum of score * row * x over all reads; None for integers."""
  if not jnp.issubdtype(table_IW.dtype, jnp.floating):
    return None

  def gradient(of_block, budget, table_IW, *inputs):
    def add_block(table_gradient_IW, inputs):
      row_BTK, block_BTK, score_BTKC, x_BTEW = inputs
      x_BTKCU = _split(of_block(block_BTK, x_BTEW), score_BTKC.shape[-1])
      update_BTKW = _join(score_BTKC[..., None] * x_BTKCU)
      return table_gradient_IW.at[row_BTK].add(
        update_BTKW.astype(table_IW.dtype), mode="promise_in_bounds"
      ), None

    block = _block_length(budget, table_IW, inputs[0])
    zeros_IW = jnp.zeros_like(table_IW)
    return blocks.scan_blocks(add_block, zeros_IW, inputs, block)[0]

  return _by_platform(gradient, table_IW, *inputs)


def _pool_in_turn(num_blocks, table_IW, *inputs):
  """Adds up the first row of every token, then the second, and so on.

  A pass over the sums reads ROWS_PER_PASS rows, of which XLA's CPU compiler
  makes one loop of vector instructions that waits for as many rows at once. A
  sum of another block than a row's reads the token's first row instead, with
  score 0: from the cache, which costs little.
  """
  block_E = jnp.arange(num_blocks)

  def pool_block(_, inputs):
    first_BT1 = inputs[0][..., :1]

    def add_rows(pooled_BTECU, read):
      row_BT, block_BT, score_BTC = read
      row_BTE, score_BTEC = row_BT[..., None], score_BTC[:, :, None]
      if num_blocks > 1:
        inside_BTE = block_BT[..., None] == block_E[None, None]
        row_BTE = jnp.where(inside_BTE, row_BTE, first_BT1)
        score_BTEC = jnp.where(inside_BTE[..., None], score_BTEC, 0)
      rows_BTECU = _split(_gather(table_IW, row_BTE), score_BTC.shape[-1])
      return pooled_BTECU + score_BTEC[..., None] * rows_BTECU, None

    batch, length, num_rows, num_cores = inputs[-1].shape
    passes = math.ceil(num_rows / ROWS_PER_PASS)
    zeros_BTECU = jnp.zeros(
      (batch, length, num_blocks, num_cores, table_IW.shape[1] // num_cores)
    )
    reads = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), inputs)
    pooled_BTECU, _ = jax.lax.scan(
      add_rows, zeros_BTECU, reads, unroll=math.ceil(num_rows / passes)
    )
    return None, _join(pooled_BTECU)

  block = blocks.block_length(
    blocks.CPU_BLOCK_BYTES,
    *inputs[0].shape[:2],
    4 * num_blocks * table_IW.shape[1],
  )
  return blocks.scan_blocks(pool_block, None, inputs, block)[1]


def _pool_at_once(num_blocks, table_IW, *inputs):
  """Gathers a block's rows and multiplies them by a matrix of scores."""

  def pool_block(_, inputs):
    row_BTK, block_BTK, score_BTKC = inputs
    rows_BTKCU = _split(_gather(table_IW, row_BTK), score_BTKC.shape[-1])
    weight_BTKEC = (
      _one_hot(block_BTK, num_blocks)[..., None] * score_BTKC[..., None, :]
    )
    pooled_BTECU = jnp.einsum(
      "BTKEC,BTKCU->BTECU", weight_BTKEC, rows_BTKCU, precision=precision.EXACT
    )
    return None, _join(pooled_BTECU)

  block = _block_length(blocks.ACCELERATOR_BLOCK_BYTES, table_IW, inputs[0])
  return blocks.scan_blocks(pool_block, None, inputs, block)[1]


def _by_platform(function, *args, **branches):
  """function(of_block, budget of a block in bytes, *args); or one of branches.

  `of_block` gives the vector of each row's block, [B, T, K, W], from block
  [B, T, K] and x [B, T, E, W]: by a gather on a CPU, by a product elsewhere.
  """
  return jax.lax.platform_dependent(
    *args,
    cpu=functools.partial(function, _take_block, blocks.CPU_BLOCK_BYTES),
    default=functools.partial(
      function, _multiply_block, blocks.ACCELERATOR_BLOCK_BYTES
    ),
    **branches,
  )


def _take_block(block_BTK, x_BTEW):
  return jnp.take_along_axis(
    x_BTEW, block_BTK[..., None], axis=2, mode="promise_in_bounds"
  )


def _multiply_block(block_BTK, x_BTEW):
  one_hot_BTKE = _one_hot(block_BTK, x_BTEW.shape[2])
  return jnp.einsum(
    "BTKE,BTEW->BTKW", one_hot_BTKE, x_BTEW, precision=precision.EXACT
  )


def _block_length(budget, table_IW, row_BTK):
  batch, length, rows = row_BTK.shape
  return blocks.block_length(
    budget, batch, length, 4 * rows * table_IW.shape[1]
  )


def _gather(table_IW, row_BTK):
  """The chosen rows as float32 [B, T, K, W]."""
  rows_BTKW = jnp.take(table_IW, row_BTK, axis=0, mode="clip")
  return precision.decode(rows_BTKW)


def _one_hot(block_BTK, num_blocks):
  return jax.nn.one_hot(block_BTK, num_blocks, dtype=jnp.float32)


def _split(x, num_cores):
  """[..., W] -> [..., C, U]."""
  return x.reshape(*x.shape[:-1], num_cores, -1)


def _join(x):
  """[..., C, U] -> [..., W]."""
  return x.reshape(*x.shape[:-2], -1)


def pool_rows_reference(table_IW, index_BTK, score_BTKC, num_blocks: int = 1):
  """`pool_rows` from the definition: slow, plain, no custom gradient."""
  num_rows, width = table_IW.shape
  num_cores = score_BTKC.shape[-1]
  weight_BTKW = jnp.repeat(score_BTKC, width // num_cores, axis=-1)
  weighted_BTKW = weight_BTKW * table_IW[index_BTK % num_rows]
  pooled = [
    jnp.where(
      (index_BTK // num_rows == block)[..., None], weighted_BTKW, 0
    ).sum(-2)
    for block in range(num_blocks)
  ]
  return jnp.stack(pooled, axis=-2)


def dot_rows_reference(table_IW, index_BTK, x_BTW):
  """`dot_rows` from the definition: slow, plain, no custom gradient."""
  return (table_IW[index_BTK] * x_BTW[..., None, :]).sum(-1)
