"""Linear maps, whose matrices a CPU reads transposed when serving."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers import prepared
from ultramem_jax.layers.parameter import parameter
from ultramem_jax.ops.cpu.matmul import dot_transposed
from ultramem_jax.ops.matmul import apply_weight


def contract(
  module: nn.Module,
  name: str,
  x: jax.Array,
  make: Callable[[], jax.Array],
  num_axes: int = 1,
) -> jax.Array:
  """Contracts the last axes of x with the first axes of a parameter.

  A module that is prepared for a CPU reads the parameter from the collection
  "prepared", with these axes last; it then need not be among "params".

  Args:
    module: owns the parameter, and has an attribute `prepared_for`.
    name: of the parameter.
    x: [..., *inputs] float.
    make: () -> parameter [*inputs, *outputs].
    num_axes: number of input axes.
  Returns:
    [..., *outputs] in x's dtype.
  """
  if module.prepared_for != "cpu":
    return apply_weight(x, make().astype(x.dtype), num_axes)
  first, last = range(num_axes), range(-num_axes, 0)
  kernel = prepared.read(
    module, name, lambda: jnp.moveaxis(make().astype(x.dtype), first, last)
  )
  width = math.prod(x.shape[-num_axes:])
  y_1TF = dot_transposed(x.reshape(1, -1, width), kernel.reshape(1, -1, width))
  return y_1TF.reshape(*x.shape[:-num_axes], *kernel.shape[:-num_axes])


class Linear(nn.Module):
  """A linear map; its `kernel` is [*inputs, *outputs], its `bias` [*outputs].

  Attributes:
    outputs: widths of the output axes.
    std: of the initial kernel, which is normally distributed.
    axes: logical names of the kernel's axes, for sharding.
    num_axes: number of x's last axes that are inputs.
    dtype: of the product.
    prepared_for: see `model.Transformer`.
    use_bias: add a bias, zeros at first.
  """

  outputs: tuple[int, ...]
  std: float
  axes: tuple[str, ...]
  num_axes: int = 1
  dtype: jnp.dtype = jnp.float32
  prepared_for: str | None = None
  use_bias: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., *inputs] to [..., *outputs]."""
    shape = *x.shape[-self.num_axes :], *self.outputs
    initializer = nn.initializers.normal(self.std)
    y = contract(
      self,
      "kernel",
      x.astype(self.dtype),
      lambda: parameter(self, "kernel", initializer, self.axes, shape),
      self.num_axes,
    )
    if not self.use_bias:
      return y
    axes = self.axes[self.num_axes :]
    bias = parameter(self, "bias", nn.initializers.zeros, axes, self.outputs)
    return y + jnp.expand_dims(bias.astype(y.dtype), range(y.ndim - bias.ndim))
