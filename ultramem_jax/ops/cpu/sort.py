"""Reads of a table in the order of their rows.

Z counts reads, T * K.
"""

import functools

import jax
import jax.numpy as jnp


def sort_by_row(
  row_TK: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
  """Sorts reads of rows in [0, num_rows), by row.

  Returns:
    (row_Z, read_Z): rows in order, and where in row_TK they stand; reads of
    the same row in the order of row_TK.
  """
  row_Z = row_TK.reshape(-1)
  return jax.lax.platform_dependent(
    row_Z,
    cpu=functools.partial(_radix_sort, num_rows=num_rows),
    default=_pair_sort,
  )


def _pair_sort(row_Z):
  read_Z = jnp.arange(row_Z.size, dtype=jnp.int32)
  return tuple(jax.lax.sort((row_Z, read_Z), num_keys=1))


def _radix_sort(row_Z, num_rows):
  """As `_pair_sort`: XLA's CPU sort of single words is far faster.

  Sorts by one digit after the other, lowest first. A word has the digit in
  its high bits and the position in the others.
  """
  position_bits = max(1, (row_Z.size - 1).bit_length())
  digit_bits = 32 - position_bits
  position_Z = jnp.arange(row_Z.size, dtype=jnp.uint32)
  read_Z = position_Z.astype(jnp.int32)
  for shift in range(0, max(1, (num_rows - 1).bit_length()), digit_bits):
    digit_Z = row_Z[read_Z].astype(jnp.uint32) >> shift
    word_Z = jnp.sort(digit_Z << position_bits | position_Z)
    order_Z = word_Z & jnp.uint32(2**position_bits - 1)
    read_Z = read_Z[order_Z.astype(jnp.int32)]
  return row_Z[read_Z], read_Z
