"""Grouped matmul: contiguous groups of rows, each times its own matrix."""

import math

import jax
import jax.numpy as jnp

# A CPU copies the part of a matrix that a step of the loop multiplies by; a
# quarter of a matrix such as a 151M model's expert stays in its cache.
PARTS = 4
# More rows than this in a chunk make its matmul no faster.
MAX_CHUNK = 128


@jax.custom_vjp
def grouped_dot(
  x_ZD: jax.Array, weight_XDF: jax.Array, size_X: jax.Array
) -> jax.Array:
  """Returns x[z] @ weight[group of z] for each row z; groups are contiguous.

  On a CPU this is a loop over the groups that are not empty, which reads their
  matrices only: `jax.lax.ragged_dot` would multiply every row by every matrix.
  Elsewhere it is `ragged_dot`.

  Args:
    x_ZD: [Z, D] float, in the order of groups.
    weight_XDF: [X, D, F], of x's dtype, a matrix for each group.
    size_X: [X] int32, rows of each group; their sum is at most Z.
  Returns:
    [Z, F] in x's dtype; rows beyond the sum of sizes are arbitrary.
    Differentiable in x and weight.
  """
  return jax.lax.platform_dependent(
    x_ZD, weight_XDF, size_X, cpu=_loop_dot, default=jax.lax.ragged_dot
  )


def _forward(*inputs):
  return grouped_dot(*inputs), inputs


def _backward(inputs, gradient_ZF):
  def differentiated(x_ZD, weight_XDF, size_X, gradient_ZF):
    _, pullback = jax.vjp(
      lambda x, weight: jax.lax.ragged_dot(x, weight, size_X), x_ZD, weight_XDF
    )
    return pullback(gradient_ZF)

  gradients = jax.lax.platform_dependent(
    *inputs, gradient_ZF, cpu=_loop_gradients, default=differentiated
  )
  return *gradients, None


grouped_dot.defvjp(_forward, _backward)


def _over_chunks(size_X, num_rows, function, carry):
  """Folds function over chunks of rows, none of which crosses a group's end.

  Args:
    size_X: rows of each group.
    num_rows: Z.
    function: (carry, group, start, stop) -> carry; rows start to stop belong to
      the group, and are at most `_chunk_length(num_rows, X)`.
    carry: any pytree.
  """
  length = _chunk_length(num_rows, size_X.shape[0])
  end_X = jnp.cumsum(size_X, dtype=jnp.int32)

  def body(loop):
    start, carry = loop
    group = jnp.searchsorted(end_X, start, side="right").astype(jnp.int32)
    stop = jnp.minimum(start + length, end_X[group])
    return stop, function(carry, group, start, stop)

  return jax.lax.while_loop(
    lambda loop: loop[0] < end_X[-1], body, (jnp.int32(0), carry)
  )[1]


def _chunk_length(num_rows: int, num_groups: int) -> int:
  """Returns the largest power of two up to twice the mean size of a group."""
  double = 2 * num_rows // num_groups
  return min(MAX_CHUNK, 1 << max(0, double.bit_length() - 1))


def _rows(x_ZD, start, length):
  return jax.lax.dynamic_slice_in_dim(x_ZD, start, length)


def _padded(x_ZD, length):
  """Pads x with room for a chunk that begins at the last row."""
  return jnp.pad(x_ZD, ((0, length), (0, 0)))


def _loop_dot(x_ZD, weight_XDF, size_X):
  """Computes `grouped_dot` in a loop over chunks and parts of a matrix."""
  num_rows, width = x_ZD.shape
  num_groups, _, out_width = weight_XDF.shape
  length = _chunk_length(num_rows, num_groups)
  part = width // math.gcd(PARTS, width)
  x_ZD = _padded(x_ZD, length)

  def multiply(y_ZF, group, start, stop):
    del stop  # the next group overwrites the rows beyond it

    def add_part(index, y_zF):
      first = jnp.int32(index * part)
      part_zd = jax.lax.dynamic_slice(x_ZD, (start, first), (length, part))
      weight_dF = jax.lax.dynamic_slice(
        weight_XDF, (group, first, jnp.int32(0)), (1, part, out_width)
      )[0]
      return y_zF + jnp.matmul(
        part_zd, weight_dF, preferred_element_type=jnp.float32
      )

    product_zF = jax.lax.fori_loop(
      0, width // part, add_part, jnp.zeros((length, out_width), jnp.float32)
    )
    return jax.lax.dynamic_update_slice_in_dim(
      y_ZF, product_zF.astype(y_ZF.dtype), start, 0
    )

  y_ZF = jnp.zeros((num_rows + length, out_width), x_ZD.dtype)
  return _over_chunks(size_X, num_rows, multiply, y_ZF)[:num_rows]


def _loop_gradients(x_ZD, weight_XDF, size_X, gradient_ZF):
  """Returns the gradients of x and weight, in a loop over chunks."""
  num_rows = x_ZD.shape[0]
  length = _chunk_length(num_rows, weight_XDF.shape[0])
  x_ZD, gradient_ZF = _padded(x_ZD, length), _padded(gradient_ZF, length)

  def add_chunk(gradients, group, start, stop):
    x_gradient_ZD, weight_gradient_XDF = gradients
    present_z1 = (jnp.arange(length, dtype=jnp.int32) < stop - start)[:, None]
    y_gradient_zF = jnp.where(present_z1, _rows(gradient_ZF, start, length), 0)
    x_gradient_ZD = jax.lax.dynamic_update_slice_in_dim(
      x_gradient_ZD, y_gradient_zF @ weight_XDF[group].T, start, 0
    )
    added_DF = _rows(x_ZD, start, length).T @ y_gradient_zF
    return x_gradient_ZD, weight_gradient_XDF.at[group].add(added_DF)

  x_gradient_ZD, weight_gradient_XDF = _over_chunks(
    size_X,
    num_rows,
    add_chunk,
    (jnp.zeros_like(x_ZD), jnp.zeros_like(weight_XDF)),
  )
  return x_gradient_ZD[:num_rows], weight_gradient_XDF
