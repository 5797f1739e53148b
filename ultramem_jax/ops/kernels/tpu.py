"""Lookup as a TPU kernel: a row goes from the table to where it is summed.

XLA's gather writes the rows of a block of tokens to the chip's memory and
reads them again to multiply them. Here a token's rows are copied one by one
into fast memory (VMEM), and summed there while those of the next token come.
An option (`model.memory.storage.kernel`): whether it is faster has not been
measured.

Letters as in `lookup`; N counts tokens, Y those of a step of the grid, J the
pairs of block and core, E * C.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Tokens of a step of the grid; the first of them waits for its rows.
TOKENS_PER_STEP = 32
LANES = 128  # of a vector register
TABLES = f"on a TPU those of float32 and k x {LANES} columns for each core"


def takes(table_IW, num_cores: int) -> bool:
  """Whether the kernel reads such a table; TABLES says which."""
  columns = table_IW.shape[1]
  return table_IW.dtype == jnp.float32 and columns % (LANES * num_cores) == 0


def pool(num_blocks: int, table_IW, row_BTK, block_BTK, score_BTKC):
  """[B, T, E, W]: the sum of each block's rows times their scores."""
  num_cores = score_BTKC.shape[-1]
  width = table_IW.shape[1]
  of_block_BTKE = jax.nn.one_hot(block_BTK, num_blocks, dtype=jnp.float32)
  weight_BTKEC = of_block_BTKE[..., None] * score_BTKC[..., None, :]
  weight_BTJK = weight_BTKEC.reshape(*row_BTK.shape, -1).swapaxes(-1, -2)

  def pool_token(rows_KW, weight_JK, out_EW):
    weight_KJ = weight_JK[...].T
    core = width // num_cores
    for block in range(num_blocks):
      for c in range(num_cores):
        slice_c = slice(c * core, (c + 1) * core)
        j = block * num_cores + c
        product_KU = weight_KJ[:, j : j + 1] * rows_KW[:, slice_c]
        out_EW[pl.ds(block, 1), slice_c] = product_KU.sum(0, keepdims=True)

  return _over_tokens(
    pool_token, table_IW, row_BTK, (weight_BTJK,), (num_blocks, width)
  )


def dot(num_cores: int, table_IW, row_BTK, block_BTK, x_BTEW):
  """[B, T, K, C]: slices of rows times those of their blocks' vectors."""
  width, num_blocks = table_IW.shape[1], x_BTEW.shape[2]
  of_block_BTKE = jax.nn.one_hot(block_BTK, num_blocks, dtype=jnp.float32)

  def dot_token(rows_KW, of_block_EK, x_EW, out_CK):
    of_block_KE = of_block_EK[...].T
    core = width // num_cores
    for c in range(num_cores):
      slice_c = slice(c * core, (c + 1) * core)
      x_KU = sum(
        of_block_KE[:, e : e + 1] * x_EW[pl.ds(e, 1), slice_c]
        for e in range(num_blocks)
      )
      dot_K1 = (x_KU * rows_KW[:, slice_c]).sum(1, keepdims=True)
      out_CK[pl.ds(c, 1), :] = dot_K1.T

  return _over_tokens(
    dot_token,
    table_IW,
    row_BTK,
    (of_block_BTKE.swapaxes(-1, -2), x_BTEW.astype(jnp.float32)),
    (num_cores, row_BTK.shape[-1]),
  ).swapaxes(-1, -2)


def _over_tokens(function, table_IW, row_BTK, inputs, out_shape):
  """Runs function on every token, its rows in fast memory.

  Args:
    function: (rows_KW, references to the token's inputs and output).
    table_IW: [I, W] float32.
    row_BTK: [B, T, K] int32 in [0, I).
    inputs: arrays [B, T, ., .] float32.
    out_shape: of a token's output.
  Returns:
    [B, T, *out_shape] float32.
  """
  batch, length, num_reads = row_BTK.shape
  count = batch * length
  padding = -count % TOKENS_PER_STEP

  def flat(x):
    x = x.reshape(count, *x.shape[2:])
    return jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))

  def per_step(shape, **options):
    return pl.BlockSpec(
      (TOKENS_PER_STEP, *shape), lambda n: (n, *[0] * len(shape)), **options
    )

  moved = 4 * count * (num_reads * table_IW.shape[1] + math.prod(out_shape))
  out = pl.pallas_call(
    functools.partial(_step, function),
    cost_estimate=pl.CostEstimate(
      flops=2 * count * num_reads * table_IW.shape[1],
      transcendentals=0,
      bytes_accessed=moved + sum(4 * x.size for x in inputs),
    ),
    grid=((count + padding) // TOKENS_PER_STEP,),
    in_specs=[
      per_step((num_reads,), memory_space=pltpu.SMEM),
      pl.BlockSpec(memory_space=pl.ANY),  # the table stays where it is
      *(per_step(x.shape[2:]) for x in inputs),
    ],
    out_specs=per_step(out_shape),
    out_shape=jax.ShapeDtypeStruct((count + padding, *out_shape), jnp.float32),
    scratch_shapes=[
      pltpu.VMEM((2, num_reads, table_IW.shape[1]), jnp.float32),
      pltpu.SemaphoreType.DMA((2,)),
    ],
  )(flat(row_BTK), table_IW, *map(flat, inputs))
  return out[:count].reshape(batch, length, *out_shape)


def _step(function, row_YK, table_IW, *references):
  """A step of the grid: its tokens one by one, each while the next one's rows

  are on their way to the other half of rows_2KW.
  """
  *arrays, rows_2KW, arrived_2 = references
  tokens, num_reads = row_YK.shape

  def copy(token, half, k):
    return pltpu.make_async_copy(
      table_IW.at[pl.ds(row_YK[token, k], 1)],
      rows_2KW.at[half, pl.ds(k, 1)],
      arrived_2.at[half],
    )

  def for_reads(do):
    jax.lax.fori_loop(0, num_reads, lambda k, _: do(k), None)

  def run(token, _):
    half = token % 2

    @pl.when(token + 1 < tokens)
    def _():
      for_reads(lambda k: copy(token + 1, 1 - half, k).start())

    for_reads(lambda k: copy(token, half, k).wait())
    function(rows_2KW[half], *(x.at[token] for x in arrays))

  for_reads(lambda k: copy(0, 0, k).start())
  jax.lax.fori_loop(0, tokens, run, None)
