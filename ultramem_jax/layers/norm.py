"""The normalization layers of the models, chosen by name."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class BiasedRMSNorm(nn.RMSNorm):
  """RMSNorm with a learned bias, as the UltraMem authors' code allows."""

  bias_init: nn.initializers.Initializer = nn.initializers.zeros

  @nn.compact
  def __call__(self, x):
    bias = self.param("bias", self.bias_init, x.shape[-1:])
    y = super().__call__(x)
    return y + bias.astype(y.dtype).reshape((1,) * (x.ndim - 1) + (-1,))


def make_norm(
  kind: str,
  eps: float,
  bias: bool = False,
  name: str | None = None,
  axis: str | None = None,
  scale_init=nn.initializers.ones,
  dtype=jnp.float32,
):
  """A norm over the last axis: statistics in float32, one learned weight.

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


class KeyNorm(nn.Module):
  """A norm of keys, of which queries can do most.

    <query, norm(key)> = inverse_std(key) * <fold(query), key>

  Keys are a large array: what is left to do on them is a sum over each. The
  equation holds without a bias only.

  Attributes:
    kind, eps, bias: as of `make_norm`.
    width: K, of a key.
    scale_init: initializer of the weight.
  """

  kind: str
  eps: float
  bias: bool
  width: int
  scale_init: nn.initializers.Initializer

  def setup(self):
    make = lambda name, init: self.param(
      name, nn.with_logical_partitioning(init, ("key",)), (self.width,)
    )
    self.scale_K = make("scale", self.scale_init)
    if self.bias:
      self.bias_K = make("bias", nn.initializers.zeros)

  def __call__(self, keys):
    """The normalized keys [..., K]."""
    centred = keys - self._mean(keys)
    normalized = self._scaled(centred * self.inverse_std(keys)[..., None])
    if self.bias:
      normalized += _expand(self.bias_K, keys)
    return normalized

  def inverse_std(self, keys):
    """[..., K] -> [...]; with "rms" the inverse root of the mean square."""
    # Two sums that need no second array as large as the keys.
    mean = self._mean(keys)
    variance = jnp.square(keys).mean(-1, keepdims=True) - jnp.square(mean)
    return jax.lax.rsqrt(jnp.maximum(variance, 0) + self.eps).squeeze(-1)

  def fold(self, query):
    """[..., K]; inner products with it do for keys that are not normalized."""
    folded = self._scaled(query)
    return folded - self._mean(folded)

  def _scaled(self, x):
    return x * _expand(self.scale_K, x)

  def _mean(self, x):
    return x.mean(-1, keepdims=True) if self.kind == "layernorm" else 0


def _expand(x_K, like):
  """x_K [K] with the leading axes of like."""
  return jnp.expand_dims(x_K, range(like.ndim - 1))
