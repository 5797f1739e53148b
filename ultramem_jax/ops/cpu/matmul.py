"""Products of few rows with large matrices, as in decoding."""

import functools

import jax
import jax.numpy as jnp

# Up to as many rows a CPU is faster with the matrix on the left
# (`python -m benchmarks.few_rows`).
FEW_ROWS = 64


def dot_transposed(x_ZLK, weight_ZNK, dtype=None):
  """x @ weight^T, for each Z; on a CPU the faster way round.

  Args:
    x_ZLK: [Z, L, K] float.
    weight_ZNK: [Z, N, K], of x's dtype.
    dtype: of sums and result; None: x's.
  Returns:
    [Z, L, N].
  """
  as_is = functools.partial(
    jnp.einsum, "ZLK,ZNK->ZLN", preferred_element_type=dtype
  )
  if x_ZLK.shape[1] > FEW_ROWS:
    return as_is(x_ZLK, weight_ZNK)
  return jax.lax.platform_dependent(
    x_ZLK, weight_ZNK, cpu=functools.partial(turned, dtype=dtype), default=as_is
  )


def turned(x_ZLK, weight_ZNK, dtype=None):
  """`dot_transposed` as (weight @ x^T)^T.

  XLA's CPU libraries rearrange the right side of a product in every call, which
  for a large matrix takes longer than its product with few rows.
  """
  y_ZNL = jnp.einsum(
    "ZNK,ZLK->ZNL", weight_ZNK, x_ZLK, preferred_element_type=dtype
  )
  # Without the barrier XLA turns it back.
  return jax.lax.optimization_barrier(y_ZNL).swapaxes(1, 2)
