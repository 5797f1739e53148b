"""Reads of a table in the order of their rows."""

import functools

import jax
import jax.numpy as jnp


def sort_by_row(
  row_TY: jax.Array, num_rows: int
) -> tuple[jax.Array, jax.Array]:
  """Sorts reads by row.

  Args:
    row_TY: int32 of any shape, in [0, num_rows).
    num_rows: bounds the rows.
  Returns:
    (row_Z, read_Z): the rows in order, and the positions in row_TY, counted
    flat, where they stand; reads of one row keep their order.
  """
  row_Z = row_TY.reshape(-1)
  return jax.lax.platform_dependent(
    row_Z,
    cpu=functools.partial(_radix_sort, num_rows=num_rows),
    default=_pair_sort,
  )


def _pair_sort(row_Z):
  read_Z = jnp.arange(row_Z.size, dtype=jnp.int32)
  row_Z, read_Z = jax.lax.sort((row_Z, read_Z), num_keys=1)
  return row_Z, read_Z


def _radix_sort(row_Z, num_rows):
  """Computes `_pair_sort` by sorting single words, far faster in XLA:CPU.

  Sorts by one digit of the row after the other, the lowest first. A word holds
  the digit in its high bits and the position in the others.
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
