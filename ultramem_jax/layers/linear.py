"""Linear maps, whose matrices a CPU reads transposed when serving."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers import prepared
from ultramem_jax.layers.parameter import parameter, uniform
from ultramem_jax.ops.cpu.matmul import dot_transposed
from ultramem_jax.ops.matmul import apply_weight
from ultramem_jax.settings.lora import LoraConfig


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

  Where `lora` names it, two more parameters make a change of low rank, which is
  zero at first: y += (alpha / rank) x A B (LoRA, arXiv 2106.09685). `lora_a` is
  [*inputs, R] and `lora_b` [R, *outputs].

  Attributes:
    outputs: widths of the output axes.
    std: of the initial kernel, which is normally distributed.
    axes: logical names of the kernel's axes, for sharding.
    num_axes: number of x's last axes that are inputs.
    dtype: of the product.
    prepared_for: see `model.Transformer`.
    use_bias: add a bias, zeros at first.
    lora: which maps have a change of low rank.
  """

  outputs: tuple[int, ...]
  std: float
  axes: tuple[str | None, ...]
  num_axes: int = 1
  dtype: jnp.dtype = jnp.float32
  prepared_for: str | None = None
  use_bias: bool = False
  lora: LoraConfig = LoraConfig()

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """Maps [..., *inputs] to [..., *outputs]."""
    inputs = self.num_axes
    into, out = self.axes[:inputs], self.axes[inputs:]
    x = x.astype(self.dtype)
    normal = nn.initializers.normal(self.std)
    zeros = nn.initializers.zeros
    y = self._multiply("kernel", x, inputs, self.outputs, self.axes, normal)
    if self.use_bias:
      bias = parameter(self, "bias", zeros, out, self.outputs).astype(y.dtype)
      y += jnp.expand_dims(bias, range(y.ndim - bias.ndim))
    # Made last, so that the others are drawn as in a model without them.
    if self.lora.adapts("/".join(self.path)):
      rank = (self.lora.rank,)
      draw = uniform(math.prod(x.shape[-inputs:]) ** -0.5)
      h = self._multiply("lora_a", x, inputs, rank, (*into, None), draw)
      h *= self.lora.scale
      y += self._multiply("lora_b", h, 1, self.outputs, (None, *out), zeros)
    return y

  def _multiply(self, name, x, num_axes, outputs, axes, initializer):
    """Contracts the last axes of x with the first axes of a parameter."""
    shape = *x.shape[-num_axes:], *outputs
    make = lambda: parameter(self, name, initializer, axes, shape)
    return contract(self, name, x, make, num_axes)
