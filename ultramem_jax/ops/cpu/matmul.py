"""Products that a CPU computes faster in another order.

Those of few rows with large matrices, as in decoding; and the gradients of wide
matrices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# Up to this many rows a CPU is faster with the matrix on the left
# (`python -m benchmarks.matmul`).
FEW_ROWS = 64
# Of rows whose bytes are a multiple of this, a column lies in few sets of a
# cache.
PAGE = 4096


def dot_transposed(
  x_BTD: jax.Array,
  weight_BFD: jax.Array,
  dtype: Any = None,
  precision: jax.lax.Precision | None = None,
) -> jax.Array:
  """Returns x @ weight^T for each b, in the order that is faster on a CPU.

  Args:
    x_BTD: [B, T, D] float.
    weight_BFD: [B, F, D], of x's dtype.
    dtype: of sums and result; None: x's.
    precision: on accelerators; a CPU has one only.
  Returns:
    [B, T, F].
  """
  x_first = functools.partial(
    jnp.einsum,
    "BTD,BFD->BTF",
    precision=precision,
    preferred_element_type=dtype,
  )
  if x_BTD.shape[1] > FEW_ROWS:
    return x_first(x_BTD, weight_BFD)
  return jax.lax.platform_dependent(
    x_BTD,
    weight_BFD,
    cpu=functools.partial(weight_first, dtype=dtype),
    default=x_first,
  )


def weight_first(
  x_BTD: jax.Array, weight_BFD: jax.Array, dtype: Any = None
) -> jax.Array:
  """Computes `dot_transposed` as (weight @ x^T)^T.

  XLA's CPU libraries rearrange the right side of a product in every call, which
  for a large matrix takes longer than its product with few rows.
  """
  y_BFT = jnp.einsum(
    "BFD,BTD->BFT", weight_BFD, x_BTD, preferred_element_type=dtype
  )
  # Without the barrier XLA would swap the sides again.
  return jax.lax.optimization_barrier(y_BFT).swapaxes(1, 2)


def sum_of_outer(x_TD: jax.Array, y_TF: jax.Array) -> jax.Array:
  """Returns x^T y, in the order that is faster on a CPU.

  Args:
    x_TD: [T, D] float.
    y_TF: [T, F], of x's dtype.
  Returns:
    [D, F].
  """
  row_bytes = y_TF.shape[1] * y_TF.dtype.itemsize
  if y_TF.shape[1] < x_TD.shape[1] or row_bytes % PAGE:
    return _untransposed(x_TD, y_TF)
  return jax.lax.platform_dependent(
    x_TD, y_TF, cpu=transposed_first, default=_untransposed
  )


def _untransposed(x_TD, y_TF):
  return jnp.tensordot(x_TD, y_TF, (0, 0))


def transposed_first(x_TD: jax.Array, y_TF: jax.Array) -> jax.Array:
  """Computes `sum_of_outer` with a copy of x that is transposed.

  Without it, XLA's CPU compiler takes another library for the product. Where
  the rows of y are pages apart, that one takes up to twice as long
  (`python -m benchmarks.matmul`).
  """
  # Without the barrier XLA would undo the copy.
  return jax.lax.optimization_barrier(x_TD.T) @ y_TF
