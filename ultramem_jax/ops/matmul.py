"""The product with a weight, whose gradient is in a form that compiles well."""

import functools
import math

import jax
import jax.numpy as jnp

from ultramem_jax.ops.cpu.matmul import sum_of_outer


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def apply_weight(
  x: jax.Array, weight: jax.Array, num_axes: int = 1
) -> jax.Array:
  """Contracts the last axes of x with the first axes of a weight.

  As `jnp.tensordot`, but for the gradient of the weight, which is x^T g here.
  JAX's own is (g^T x)^T: XLA then writes a transposed copy of g for every
  weight, on a CPU together with all that made g, once for each copy.

  Args:
    x: [..., *inputs] float.
    weight: [*inputs, *outputs], of x's dtype.
    num_axes: number of input axes.
  Returns:
    [..., *outputs].
  """
  return jnp.tensordot(x, weight, num_axes)


def _forward(x, weight, num_axes):
  return apply_weight(x, weight, num_axes), (x, weight)


def _backward(num_axes, saved, g):
  x, weight = saved
  # One axis each: a dot that contracts several axes transposes its operands.
  inputs = math.prod(weight.shape[:num_axes])
  x_TD, g_TF = x.reshape(-1, inputs), g.reshape(-1, weight.size // inputs)
  x_gradient_TD = jnp.tensordot(g_TF, weight.reshape(inputs, -1), (1, 1))
  gradient_DF = sum_of_outer(x_TD, g_TF)
  return x_gradient_TD.reshape(x.shape), gradient_DF.reshape(weight.shape)


apply_weight.defvjp(_forward, _backward)
