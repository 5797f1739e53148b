"""Products of few rows with large matrices, as in decoding."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# Up to this many rows a CPU is faster with the matrix on the left
# (`python -m benchmarks.matmul`).
FEW_ROWS = 64


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
