"""Lookup as a GPU kernel: each row is read once, from the table to its sum.

XLA's gather writes the rows of a chunk of tokens to the GPU's memory, and reads
them again to multiply them. Here they are read once, into registers, tile by
tile: a few of a token's rows, and as many columns as a warp loads at once. It
is an option (`model.memory.storage.kernel`); whether it is faster has not been
measured.

It uses the Triton form of Pallas, whose loads take a list of rows. The other
form for GPUs, Mosaic, copies boxes, and lists of rows only from Blackwell on;
and jax 0.10 does not interpret it, so that only a GPU could test it. (JAX warns
from 0.11 on that it will remove Triton.)

T counts the tokens of the whole batch, t is one of them; y are the reads of a
tile and w its columns.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ultramem_jax.ops import precision

TABLES = "on a GPU tables of float32 and bfloat16"
DTYPES = (jnp.float32, jnp.bfloat16, jnp.uint16)
# Bytes of a row of a tile, at most: each of a warp's 32 threads loads 16, which
# is the most that one instruction loads.
BYTES = 512
# Numbers of a tile, in registers: 64 for each thread of a warp.
NUMBERS = 2048


def takes(table_IW: jax.Array, num_cores: int) -> bool:
  """Returns whether the kernel reads such a table; TABLES says which.

  It reads no int8: Triton counts in 32 bits with sign, and a large table of
  int8 holds more numbers.
  """
  del num_cores
  return table_IW.dtype in DTYPES


def pool(
  num_pools: int,
  table_IW: jax.Array,
  row_BTY: jax.Array,
  pool_BTY: jax.Array,
  score_BTYC: jax.Array,
) -> jax.Array:
  """Returns the sum [B, T, E, W] of each pool's rows times their scores."""
  num_reads, width = row_BTY.shape[-1], table_IW.shape[1]
  core_width = width // score_BTYC.shape[-1]
  rows, columns = _tile_shape(table_IW, core_width, num_reads)

  def pool_columns(table_IW, row_TY, pool_TY, score_TYC, out_TEW):
    t, part = _divmod(pl.program_id(0), width // columns)
    first = part * columns

    def add_tile(tile, sums):
      reads = _reads(tile, rows, num_reads)
      rows_yw = _load_rows(table_IW, row_TY, t, reads, first, columns)
      pool_y = _load(pool_TY, reads, t)
      score_y = _load(score_TYC, reads, t, jax.lax.div(first, core_width))

      def add(e, sum_w):
        weight_y = jnp.where(pool_y == e, score_y, 0)
        return sum_w + (weight_y[:, None] * rows_yw).sum(0)

      return tuple(add(e, sum_w) for e, sum_w in enumerate(sums))

    zeros_w = jnp.zeros(columns, jnp.float32)
    sums = jax.lax.fori_loop(
      0, pl.cdiv(num_reads, rows), add_tile, (zeros_w,) * num_pools
    )
    for e, sum_w in enumerate(sums):
      out_TEW[t, e, pl.ds(first, columns)] = sum_w

  # One warp: each thread then holds the same columns of every row, and adds
  # them up without exchanging anything with other threads.
  return _over_tokens(
    pool_columns,
    width // columns,
    1,
    (num_pools, width),
    table_IW,
    row_BTY,
    pool_BTY,
    score_BTYC,
  )


def dot(
  num_cores: int,
  table_IW: jax.Array,
  row_BTY: jax.Array,
  pool_BTY: jax.Array,
  x_BTEW: jax.Array,
) -> jax.Array:
  """Returns products [B, T, Y, C] of row slices with their pool's vector."""
  num_reads, width = row_BTY.shape[-1], table_IW.shape[1]
  core_width = width // num_cores
  rows, columns = _tile_shape(table_IW, core_width, num_reads)
  tiles = pl.cdiv(num_reads, rows)

  def dot_tile(table_IW, row_TY, pool_TY, x_TEW, out_TYC):
    rest, core = _divmod(pl.program_id(0), num_cores)
    t, tile = _divmod(rest, tiles)
    reads = read_y, is_read_y = _reads(tile, rows, num_reads)
    pool_y = _load(pool_TY, reads, t)

    def add_columns(part, sum_yw):
      first = core * core_width + part * columns
      rows_yw = _load_rows(table_IW, row_TY, t, reads, first, columns)
      return sum_yw + rows_yw * x_TEW[t, pool_y, pl.ds(first, columns)]

    sum_yw = jax.lax.fori_loop(
      0,
      core_width // columns,
      add_columns,
      jnp.zeros((rows, columns), jnp.float32),
    )
    triton.store(out_TYC.at[t, read_y, core], sum_yw.sum(1), mask=is_read_y)

  return _over_tokens(
    dot_tile,
    num_cores * tiles,
    4,
    (num_reads, num_cores),
    table_IW,
    row_BTY,
    pool_BTY,
    x_BTEW.astype(jnp.float32),
  )


def _tile_shape(table_IW, core_width, num_reads):
  """Returns (rows, columns) of a tile: powers of 2, as Triton demands."""
  columns = math.gcd(core_width, BYTES // table_IW.dtype.itemsize)
  return min(NUMBERS // columns, pl.next_power_of_2(num_reads)), columns


def _over_tokens(kernel, programs, num_warps, out_shape, table_IW, *inputs):
  """Runs the programs of a kernel for each token.

  Args:
    kernel: takes references to the table, the inputs and the output, all whole.
    programs: number for each token; those of token t start at t * programs.
    num_warps: warps of 32 threads in a program.
    out_shape: shape of a token's output.
    inputs: [B, T, ...].
  Returns:
    [B, T, *out_shape] float32.
  """
  batch, length = inputs[0].shape[:2]
  count = batch * length
  out = pl.pallas_call(
    kernel,
    compiler_params=triton.CompilerParams(num_warps=num_warps),
    # One dimension, since the others are limited to 65535.
    grid=(count * programs,),
    out_shape=jax.ShapeDtypeStruct((count, *out_shape), jnp.float32),
  )(table_IW, *(x.reshape(count, *x.shape[2:]) for x in inputs))
  return out.reshape(batch, length, *out_shape)


def _divmod(program, count: int):
  """Returns (program // count, program % count)."""
  return jax.lax.div(program, count), jax.lax.rem(program, count)


def _reads(tile, rows, num_reads):
  """Returns the numbers of a tile's reads, and whether the token has them."""
  read_y = tile * rows + jnp.arange(rows)
  return read_y, read_y < num_reads


def _load(array, reads, t, *rest):
  """Returns array[t, read_y, *rest]; 0 past the last read."""
  read_y, is_read_y = reads
  return triton.load(array.at[t, read_y, *rest], mask=is_read_y, other=0)


def _load_rows(table_IW, row_TY, t, reads, first, columns):
  """Returns some columns of a tile's rows, float32; 0 past the last read."""
  row_y1 = _load(row_TY, reads, t)[:, None]
  column_1w = first + jnp.arange(columns)[None]
  is_read_yw = jnp.broadcast_to(reads[1][:, None], (row_y1.size, columns))
  rows_yw = triton.load(
    table_IW.at[row_y1, column_1w], mask=is_read_yw, other=0
  )
  return precision.decode(rows_yw)
