"""Products that a CPU computes faster in another order.

Those of few rows with large matrices, as in decoding; and the gradients of
matrices.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# Up to this many rows a CPU is faster with the matrix on the left
# (`python -m benchmarks.matmul --parts=few_rows`).
FEW_ROWS = 64
# Where the rows of x and y are a multiple of these bytes, a CPU computes x^T y
# faster from a copy of x (`python -m benchmarks.matmul --parts=gradients`).
ROW_BYTES = 512


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
  if not gains_from_copy(x_TD.shape[1], y_TF.shape[1], x_TD.dtype):
    return _untransposed(x_TD, y_TF)
  return jax.lax.platform_dependent(
    x_TD, y_TF, cpu=transposed_first, default=_untransposed
  )


def gains_from_copy(width: int, out_width: int, dtype: Any) -> bool:
  """Returns whether a CPU computes x^T y faster from a copy of x.

  Args:
    width: D of x [T, D].
    out_width: F of y [T, F].
    dtype: of both.
  """
  # A wide x is mostly the activation of an MLP, which XLA computes again to
  # write the copy.
  size = jnp.dtype(dtype).itemsize
  is_aligned = all(size * x % ROW_BYTES == 0 for x in (width, out_width))
  return is_aligned and width <= out_width


def _untransposed(x_TD, y_TF):
  return jnp.tensordot(x_TD, y_TF, (0, 0))


def transposed_first(x_TD: jax.Array, y_TF: jax.Array) -> jax.Array:
  """Computes `sum_of_outer` with a copy of x that is transposed.

  Without it, XLA's CPU compiler takes another library for the product, which is
  up to twice as slow where equal columns of many rows share a set of the cache.
  """
  # Without the barrier XLA would undo the copy.
  return jax.lax.optimization_barrier(x_TD.T) @ y_TF
