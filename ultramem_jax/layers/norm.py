"""Normalization layers, chosen by name."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


class BiasedRMSNorm(nn.RMSNorm):
  """RMSNorm with a learned bias, as the UltraMem authors' code allows."""

  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(
    self, x: jax.Array, *, mask: jax.Array | None = None
  ) -> jax.Array:
    bias = self.param("bias", self.bias_init, x.shape[-1:], jnp.float32)
    y = super().__call__(x, mask=mask)
    return y + bias.astype(y.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def make_norm(
  kind: str,
  eps: float,
  bias: bool = False,
  name: str | None = None,
  axis: str | None = None,
  scale_init: nn.initializers.Initializer = nn.initializers.ones,
  dtype: Any = jnp.float32,
) -> nn.Module:
  """Returns a norm of the last axis: float32 statistics, one learned weight.

  Args:
    kind: "layernorm" or "rms".
    eps: added to the variance.
    bias: learn a bias too.
    name: the module's name.
    axis: logical name of the last axis, for sharding.
    scale_init: initializer of the weight.
    dtype: of the result.
  """
  scale_init = nn.with_logical_partitioning(scale_init, (axis,))
  bias_init = nn.with_logical_partitioning(nn.initializers.zeros, (axis,))
  if kind == "rms" and bias:
    return BiasedRMSNorm(
      epsilon=eps,
      dtype=dtype,
      scale_init=scale_init,
      bias_init=bias_init,
      name=name,
    )
  if kind == "rms":
    return nn.RMSNorm(
      epsilon=eps, dtype=dtype, scale_init=scale_init, name=name
    )
  return nn.LayerNorm(
    epsilon=eps,
    use_bias=bias,
    dtype=dtype,
    scale_init=scale_init,
    bias_init=bias_init,
    use_fast_variance=False,
    name=name,
  )
