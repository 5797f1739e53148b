"""Tests of products with weights, and of their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops.matmul import apply_weight
from ultramem_jax.testing import assert_close

SHAPES = {
  "matrix": ((2, 3, 4), (4, 5), 1),
  "into heads": ((2, 3, 4), (4, 2, 3), 1),
  "out of heads": ((2, 3, 2, 4), (2, 4, 5), 2),
  "no batch": ((4,), (4, 5), 1),
}


def value_and_gradients(function, x, weight, num_axes, g):
  y, pullback = jax.vjp(lambda *args: function(*args, num_axes), x, weight)
  return y, pullback(g)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("case", SHAPES)
def test_equals_tensordot_and_so_do_its_gradients(case, dtype):
  x_shape, weight_shape, num_axes = SHAPES[case]
  rng = np.random.default_rng(0)
  y_shape = x_shape[: len(x_shape) - num_axes] + weight_shape[num_axes:]
  x, weight, g = (
    jnp.asarray(rng.normal(size=shape), dtype)
    for shape in (x_shape, weight_shape, y_shape)
  )
  actual = value_and_gradients(apply_weight, x, weight, num_axes, g)
  expected = value_and_gradients(jnp.tensordot, x, weight, num_axes, g)
  assert all(a.dtype == dtype for a in jax.tree.leaves(actual))
  assert_close(actual, expected, jnp.dtype(dtype).name)


def test_nothing_is_transposed():
  """As in JAX's own gradient, where XLA then transposes what it is made of."""

  def primitives(function):
    gradient = jax.grad(lambda *args: function(*args, 1).sum(), argnums=(0, 1))
    jaxpr = jax.make_jaxpr(gradient)(jnp.ones((2, 3, 4)), jnp.ones((4, 5)))
    return {equation.primitive.name for equation in jaxpr.eqns}

  assert "transpose" in primitives(jnp.tensordot)
  assert "transpose" not in primitives(apply_weight)
