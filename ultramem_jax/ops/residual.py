"""The residual stream, whose gradient is in a form that compiles well."""

import jax


@jax.custom_vjp
def fork(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns x twice: for the residual stream, and for the layer beside it.

  The gradient is the sum of both, as JAX's own. But JAX adds the terms of the
  layer's gradient to that of the stream one by one, and the last term of a
  norm's is one number per position. To XLA's CPU compiler such a sum is cheap,
  and every layer computes it again, with the sums that it is made of: those of
  all layers above. Here the layer's terms are summed first. What is left adds
  two whole arrays, and XLA keeps its result.

  Args:
    x: [..., D] float.
  """
  return x, x


def _forward(x):
  return fork(x), None


def _backward(_, gradients):
  x, branch = gradients
  return (x + branch,)


fork.defvjp(_forward, _backward)
