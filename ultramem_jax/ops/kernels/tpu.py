"""Lookup as a TPU kernel: each row is read once, from the table to its sum.

XLA's gather writes the rows of a chunk of tokens to the chip's memory, and
reads them again to multiply them. Here a token's rows are copied one by one
into fast memory (VMEM), and summed there while those of the next token arrive.
It is an option (`model.memory.storage.kernel`); whether it is faster has not
been measured.

T counts the tokens of the whole batch, t those of a step of the grid; e are
the pairs of pool and core, E C of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Tokens in a step of the grid; the first of them waits for its rows.
TOKENS_PER_STEP = 32
LANES = 128  # of a vector register
TABLES = (
  f"on a TPU tables of float32 with a multiple of {LANES} columns for each core"
)


def takes(table_IW: jax.Array, num_cores: int) -> bool:
  """Returns whether the kernel reads such a table; TABLES says which."""
  columns = table_IW.shape[1]
  return table_IW.dtype == jnp.float32 and columns % (LANES * num_cores) == 0


def pool(
  num_pools: int,
  table_IW: jax.Array,
  row_BTY: jax.Array,
  pool_BTY: jax.Array,
  score_BTYC: jax.Array,
) -> jax.Array:
  """Returns the sum [B, T, E, W] of each pool's rows times their scores."""
  num_cores = score_BTYC.shape[-1]
  width = table_IW.shape[1]
  of_pool_BTYE = jax.nn.one_hot(pool_BTY, num_pools, dtype=jnp.float32)
  weight_BTYEC = of_pool_BTYE[..., None] * score_BTYC[..., None, :]
  weight_BTeY = weight_BTYEC.reshape(*row_BTY.shape, -1).swapaxes(-1, -2)

  def pool_token(rows_YW, weight_eY, out_EW):
    weight_Ye = weight_eY[...].T
    core = width // num_cores
    for e in range(num_pools):
      for c in range(num_cores):
        slice_c = slice(c * core, (c + 1) * core)
        pair = e * num_cores + c
        product_Yw = weight_Ye[:, pair : pair + 1] * rows_YW[:, slice_c]
        out_EW[pl.ds(e, 1), slice_c] = product_Yw.sum(0, keepdims=True)

  return _over_tokens(
    pool_token, table_IW, row_BTY, (weight_BTeY,), (num_pools, width)
  )


def dot(
  num_cores: int,
  table_IW: jax.Array,
  row_BTY: jax.Array,
  pool_BTY: jax.Array,
  x_BTEW: jax.Array,
) -> jax.Array:
  """Returns products [B, T, Y, C] of row slices with their pool's vector."""
  width, num_pools = table_IW.shape[1], x_BTEW.shape[2]
  of_pool_BTYE = jax.nn.one_hot(pool_BTY, num_pools, dtype=jnp.float32)

  def dot_token(rows_YW, of_pool_EY, x_EW, out_CY):
    of_pool_YE = of_pool_EY[...].T
    core = width // num_cores
    for c in range(num_cores):
      slice_c = slice(c * core, (c + 1) * core)
      x_Yw = sum(
        of_pool_YE[:, e : e + 1] * x_EW[pl.ds(e, 1), slice_c]
        for e in range(num_pools)
      )
      dot_Y1 = (x_Yw * rows_YW[:, slice_c]).sum(1, keepdims=True)
      out_CY[pl.ds(c, 1), :] = dot_Y1.T

  return _over_tokens(
    dot_token,
    table_IW,
    row_BTY,
    (of_pool_BTYE.swapaxes(-1, -2), x_BTEW.astype(jnp.float32)),
    (num_cores, row_BTY.shape[-1]),
  ).swapaxes(-1, -2)


def _over_tokens(function, table_IW, row_BTY, inputs, out_shape):
  """Runs a function on every token, with the token's rows in fast memory.

  Args:
    function: takes rows_YW, and references to the token's inputs and output.
    table_IW: [I, W] float32.
    row_BTY: [B, T, Y] int32 in [0, I).
    inputs: arrays [B, T, ., .] float32.
    out_shape: shape of a token's output.
  Returns:
    [B, T, *out_shape] float32.
  """
  batch, length, num_reads = row_BTY.shape
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
  )(flat(row_BTY), table_IW, *map(flat, inputs))
  return out[:count].reshape(batch, length, *out_shape)


def _step(function, row_tY, table_IW, *references):
  """Runs a step of the grid: one token after the other.

  While a token is computed, the rows of the next one are copied to the other
  half of rows_2YW.
  """
  *arrays, rows_2YW, arrived_2 = references
  tokens, num_reads = row_tY.shape

  def copy(token, half, y):
    return pltpu.make_async_copy(
      table_IW.at[pl.ds(row_tY[token, y], 1)],
      rows_2YW.at[half, pl.ds(y, 1)],
      arrived_2.at[half],
    )

  def for_reads(do):
    jax.lax.fori_loop(0, num_reads, lambda y, _: do(y), None)

  def run(token, _):
    half = token % 2

    @pl.when(token + 1 < tokens)
    def _():
      for_reads(lambda y: copy(token + 1, 1 - half, y).start())

    for_reads(lambda y: copy(token, half, y).wait())
    function(rows_2YW[half], *(x.at[token] for x in arrays))

  for_reads(lambda y: copy(0, 0, y).start())
  jax.lax.fori_loop(0, tokens, run, None)
