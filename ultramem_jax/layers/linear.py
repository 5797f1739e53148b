"""Linear maps, whose matrices a CPU serves transposed."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp

from ultramem_jax.ops.cpu import matmul as few_rows


def contract(
  module: nn.Module, name: str, x, make: Callable, num_axes: int = 1
):
  """x, its last axes contracted with the first of a module's parameter.

  Where the collection "transposed" holds the parameter, with these axes last,
  it is read from there and need not be among "params"; where that collection is
  mutable, it is put there (`serving.prepare`).

  Args:
    module: that the parameter belongs to.
    name: of the parameter.
    x: [..., *inputs] float.
    make: () -> parameter [*inputs, *outputs].
    num_axes: of the inputs.
  Returns:
    [..., *outputs] in x's dtype.
  """
  if module.has_variable("transposed", name):
    kernel = module.get_variable("transposed", name)
    width = math.prod(x.shape[-num_axes:])
    y_1ZF = few_rows.dot_transposed(
      x.reshape(1, -1, width), kernel.reshape(1, -1, width)
    )
    return y_1ZF.reshape(*x.shape[:-num_axes], *kernel.shape[:-num_axes])
  kernel = make().astype(x.dtype)
  if (
    module.is_mutable_collection("transposed") and not module.is_initializing()
  ):
    first, last = range(num_axes), range(-num_axes, 0)
    module.put_variable("transposed", name, jnp.moveaxis(kernel, first, last))
  return jnp.tensordot(x, kernel, num_axes)


class Linear(nn.Module):
  """A linear map without a bias: `kernel` [*inputs, *outputs], drawn normally.

  Attributes:
    outputs: their widths.
    std: of the initial kernel.
    axes: names of the kernel's axes, for sharding.
    num_axes: how many of x's last axes are the inputs.
    dtype: of the product.
  """

  outputs: tuple[int, ...]
  std: float
  axes: tuple[str, ...]
  num_axes: int = 1
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x):
    """[..., *inputs] -> [..., *outputs]."""
    shape = *x.shape[-self.num_axes :], *self.outputs
    initializer = nn.with_logical_partitioning(
      nn.initializers.normal(self.std), self.axes
    )
    return contract(
      self,
      "kernel",
      x.astype(self.dtype),
      lambda: self.param("kernel", initializer, shape),
      self.num_axes,
    )
