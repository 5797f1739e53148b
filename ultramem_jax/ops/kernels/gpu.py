"""Lookup as a GPU kernel: a row goes from the table to where it is summed.

XLA's gather writes the rows of a block of tokens to the GPU's memory and reads
them again to multiply them. Here they are read once, into registers, tile by
tile: some of a token's rows, of each as many columns as a warp loads at once.
An option (`model.memory.storage.kernel`): whether it is faster has not been
measured.

In the Triton form of Pallas, whose loads take a list of rows. The other one for
GPUs, Mosaic, copies boxes, and lists of rows only from Blackwell on; and jax
0.10 does not interpret it, so that only a GPU could test it. (JAX warns from
0.11 on that Triton will go.)

Letters as in `lookup`; N counts tokens, Y rows and Z columns of a tile.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from ultramem_jax.ops import precision

TABLES = "on a GPU those of float32 and bfloat16"
DTYPES = (jnp.float32, jnp.bfloat16, jnp.uint16)
# Of a row of a tile, at most: each of a warp's 32 threads loads 16, the most
# that one instruction loads.
BYTES = 512
# Of a tile, in registers: 64 for each thread of a warp.
NUMBERS = 2048


def takes(table_IW, num_cores: int) -> bool:
  """Whether the kernel reads such a table; TABLES says which.

  Not int8: Triton counts up to 4 GiB in 32 bits, of which one is the sign.
  """
  del num_cores
  return table_IW.dtype in DTYPES


def pool(num_blocks: int, table_IW, row_BTK, block_BTK, score_BTKC):
  """[B, T, E, W]: the sum of each block's rows times their scores."""
  num_reads, width = row_BTK.shape[-1], table_IW.shape[1]
  core_width = width // score_BTKC.shape[-1]
  rows, columns = _tile_shape(table_IW, core_width, num_reads)

  def pool_columns(table_IW, row_NK, block_NK, score_NKC, out_NEW):
    n, part = _split(pl.program_id(0), width // columns)
    first = part * columns

    def add_tile(tile, sums):
      reads = _reads(tile, rows, num_reads)
      rows_YZ = _load_rows(table_IW, row_NK, n, reads, first, columns)
      block_Y = _load(block_NK, reads, n)
      score_Y = _load(score_NKC, reads, n, jax.lax.div(first, core_width))

      def add(e, sum_Z):
        weight_Y = jnp.where(block_Y == e, score_Y, 0)
        return sum_Z + (weight_Y[:, None] * rows_YZ).sum(0)

      return tuple(add(e, sum_Z) for e, sum_Z in enumerate(sums))

    zeros_Z = jnp.zeros(columns, jnp.float32)
    sums = jax.lax.fori_loop(
      0, pl.cdiv(num_reads, rows), add_tile, (zeros_Z,) * num_blocks
    )
    for e, sum_Z in enumerate(sums):
      out_NEW[n, e, pl.ds(first, columns)] = sum_Z

  # One warp: a thread then holds the same columns of every row, and adds them
  # up without a word to the others.
  return _over_tokens(
    pool_columns,
    width // columns,
    1,
    (num_blocks, width),
    table_IW,
    row_BTK,
    block_BTK,
    score_BTKC,
  )


def dot(num_cores: int, table_IW, row_BTK, block_BTK, x_BTEW):
  """[B, T, K, C]: slices of rows times those of their blocks' vectors."""
  num_reads, width = row_BTK.shape[-1], table_IW.shape[1]
  core_width = width // num_cores
  rows, columns = _tile_shape(table_IW, core_width, num_reads)
  tiles = pl.cdiv(num_reads, rows)

  def dot_tile(table_IW, row_NK, block_NK, x_NEW, out_NKC):
    rest, core = _split(pl.program_id(0), num_cores)
    n, tile = _split(rest, tiles)
    reads = read_Y, is_read_Y = _reads(tile, rows, num_reads)
    block_Y = _load(block_NK, reads, n)

    def add_columns(part, sum_YZ):
      first = core * core_width + part * columns
      rows_YZ = _load_rows(table_IW, row_NK, n, reads, first, columns)
      return sum_YZ + rows_YZ * x_NEW[n, block_Y, pl.ds(first, columns)]

    sum_YZ = jax.lax.fori_loop(
      0,
      core_width // columns,
      add_columns,
      jnp.zeros((rows, columns), jnp.float32),
    )
    triton.store(out_NKC.at[n, read_Y, core], sum_YZ.sum(1), mask=is_read_Y)

  return _over_tokens(
    dot_tile,
    num_cores * tiles,
    4,
    (num_reads, num_cores),
    table_IW,
    row_BTK,
    block_BTK,
    x_BTEW.astype(jnp.float32),
  )


def _tile_shape(table_IW, core_width, num_reads):
  """(rows, columns) of a tile: powers of 2, as Triton wants them."""
  columns = math.gcd(core_width, BYTES // table_IW.dtype.itemsize)
  return min(NUMBERS // columns, pl.next_power_of_2(num_reads)), columns


def _over_tokens(kernel, programs, num_warps, out_shape, table_IW, *inputs):
  """Runs so many programs of the kernel for each token.

  Args:
    kernel: (references to the table, to the inputs and to the output, whole).
    programs: the first of a token's is n * programs.
    num_warps: of 32 threads each, in a program.
    out_shape: of a token's output.
    inputs: [B, T, ...].
  Returns:
    [B, T, *out_shape] float32.
  """
  batch, length = inputs[0].shape[:2]
  count = batch * length
  out = pl.pallas_call(
    kernel,
    compiler_params=triton.CompilerParams(num_warps=num_warps),
    # One dimension, since the others end at 65535.
    grid=(count * programs,),
    out_shape=jax.ShapeDtypeStruct((count, *out_shape), jnp.float32),
  )(table_IW, *(x.reshape(count, *x.shape[2:]) for x in inputs))
  return out.reshape(batch, length, *out_shape)


def _split(program, count: int):
  """(program // count, program % count)."""
  return jax.lax.div(program, count), jax.lax.rem(program, count)


def _reads(tile, rows, num_reads):
  """(read_Y, is_read_Y): a token's reads in a tile, those past the last too."""
  read_Y = tile * rows + jnp.arange(rows)
  return read_Y, read_Y < num_reads


def _load(array, reads, n, *rest):
  """array[n, read_Y, *rest]; 0 past the last read."""
  read_Y, is_read_Y = reads
  return triton.load(array.at[n, read_Y, *rest], mask=is_read_Y, other=0)


def _load_rows(table_IW, row_NK, n, reads, first, columns):
  """Some columns of a tile's rows, [Y, Z] float32; 0 past the last read."""
  row_Y1 = _load(row_NK, reads, n)[:, None]
  column_1Z = first + jnp.arange(columns)[None]
  is_read_YZ = jnp.broadcast_to(reads[1][:, None], (row_Y1.size, columns))
  rows_YZ = triton.load(
    table_IW.at[row_Y1, column_1Z], mask=is_read_YZ, other=0
  )
  return precision.decode(rows_YZ)
