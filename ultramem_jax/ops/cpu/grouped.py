"""Grouped matmul: contiguous groups of rows, each times its own matrix.

Letters: Z rows, X groups, D and F the widths of a matrix.
"""

import math

import jax
import jax.numpy as jnp

# A CPU copies the part of a matrix that a loop's step multiplies by; of
# matrices such as a 151M model's experts, a quarter stays in its cache.
PARTS = 4
# More rows than this a step make its matmul no faster.
MAX_BLOCK = 128


@jax.custom_vjp
def grouped_dot(x_ZD, weight_XDF, size_X):
  """out[z] = x[z] @ weight[group of z], the groups being sorted.

  On a CPU a loop over the groups that are not empty, which reads their
  matrices alone: there, `jax.lax.ragged_dot` multiplies every row by every
  matrix. Elsewhere it is `ragged_dot`.

  Args:
    x_ZD: [Z, D] float.
    weight_XDF: [X, D, F], of x's dtype.
    size_X: [X] int32, rows of each group; their sum is at most Z.
  Returns:
    [Z, F] in x's dtype; of rows beyond the sum, anything. Differentiable in x
    and weight.
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


def _over_blocks(size_X, num_rows, function, carry):
  """Folds function over blocks of rows, none of which crosses a group's end.

  Args:
    size_X: rows of each group.
    num_rows: Z.
    function: (carry, group, start, stop) -> carry; rows start to stop are of
      the group, at most `_block(num_rows, X)` of them.
    carry: any pytree.
  """
  block = _block(num_rows, size_X.shape[0])
  end_X = jnp.cumsum(size_X)

  def body(loop):
    start, carry = loop
    group = jnp.searchsorted(end_X, start, side="right")
    stop = jnp.minimum(start + block, end_X[group])
    return stop, function(carry, group, start, stop)

  return jax.lax.while_loop(
    lambda loop: loop[0] < end_X[-1], body, (jnp.int32(0), carry)
  )[1]


def _block(num_rows: int, num_groups: int) -> int:
  """Rows a step: the power of two below twice the mean of a group."""
  double = 2 * num_rows // num_groups
  return min(MAX_BLOCK, 1 << max(0, double.bit_length() - 1))


def _rows(x_ZD, start, block):
  return jax.lax.dynamic_slice_in_dim(x_ZD, start, block)


def _padded(x_ZD, block):
  """With room for a block that begins at the last row."""
  return jnp.pad(x_ZD, ((0, block), (0, 0)))


def _loop_dot(x_ZD, weight_XDF, size_X):
  num_rows, width = x_ZD.shape
  num_groups, _, out_width = weight_XDF.shape
  block = _block(num_rows, num_groups)
  part = width // math.gcd(PARTS, width)
  x_ZD = _padded(x_ZD, block)

  def multiply(y_ZF, group, start, stop):
    del stop  # rows beyond it are written again by their own group

    def add_part(index, y_ZF):
      piece_ZD = jax.lax.dynamic_slice(
        x_ZD, (start, index * part), (block, part)
      )
      weight_DF = jax.lax.dynamic_slice(
        weight_XDF, (group, index * part, 0), (1, part, out_width)
      )[0]
      return y_ZF + jnp.matmul(
        piece_ZD, weight_DF, preferred_element_type=jnp.float32
      )

    product_ZF = jax.lax.fori_loop(
      0, width // part, add_part, jnp.zeros((block, out_width), jnp.float32)
    )
    return jax.lax.dynamic_update_slice_in_dim(
      y_ZF, product_ZF.astype(y_ZF.dtype), start, 0
    )

  y_ZF = jnp.zeros((num_rows + block, out_width), x_ZD.dtype)
  return _over_blocks(size_X, num_rows, multiply, y_ZF)[:num_rows]


def _loop_gradients(x_ZD, weight_XDF, size_X, gradient_ZF):
  num_rows = x_ZD.shape[0]
  block = _block(num_rows, weight_XDF.shape[0])
  x_ZD, gradient_ZF = _padded(x_ZD, block), _padded(gradient_ZF, block)

  def add_block(gradients, group, start, stop):
    x_gradient_ZD, weight_gradient_XDF = gradients
    present_Z1 = (jnp.arange(block) < stop - start)[:, None]
    y_gradient_ZF = jnp.where(present_Z1, _rows(gradient_ZF, start, block), 0)
    x_gradient_ZD = jax.lax.dynamic_update_slice_in_dim(
      x_gradient_ZD, y_gradient_ZF @ weight_XDF[group].T, start, 0
    )
    added_DF = _rows(x_ZD, start, block).T @ y_gradient_ZF
    return x_gradient_ZD, weight_gradient_XDF.at[group].add(added_DF)

  x_gradient_ZD, weight_gradient_XDF = _over_blocks(
    size_X,
    num_rows,
    add_block,
    (jnp.zeros_like(x_ZD), jnp.zeros_like(weight_XDF)),
  )
  return x_gradient_ZD[:num_rows], weight_gradient_XDF
