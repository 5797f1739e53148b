"""Keys of a memory, in the forms in which queries score them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers import prepared
from ultramem_jax.layers.parameter import parameter
from ultramem_jax.ops import retrieval


class Keys(NamedTuple):
  """The keys of a layer, as its queries score them.

  keys_PARNK: [P, A, R, N, K] in the layer's dtype.
  scale_PARN: float32, factors of their scores; None if the keys are normalized.
  merged_PANK: keys merged with the filter vectors, if they were prepared.
  """

  keys_PARNK: jax.Array
  scale_PARN: jax.Array | None = None
  merged_PANK: jax.Array | None = None


class KeyNorm(nn.Module):
  """A norm of keys, most of which can be applied to queries instead.

    <query, norm(key)> = inverse_std(key) * <fold(query), key>

  Keys are a large array, of which this equation needs a sum for each key, and
  no normalized copy. It holds without a bias only.

  Attributes:
    kind, eps, bias: see `norm.make_norm`.
    width: K.
    scale_init: initializer of the weight.
  """

  kind: str
  eps: float
  bias: bool
  width: int
  scale_init: nn.initializers.Initializer

  def setup(self):
    make = lambda name, init: parameter(
      self, name, init, ("key",), (self.width,)
    )
    self.scale_K = make("scale", self.scale_init)
    if self.bias:
      self.bias_K = make("bias", nn.initializers.zeros)

  def __call__(self, keys: jax.Array) -> jax.Array:
    """Returns the normalized keys [..., K]."""
    centred = keys - self._mean(keys)
    normalized = self._scaled(centred * self.inverse_std(keys)[..., None])
    if self.bias:
      normalized += _expand(self.bias_K, keys)
    return normalized

  def inverse_std(self, keys: jax.Array) -> jax.Array:
    """Returns 1 / std of each key; with "rms", 1 / root of the mean square."""
    # Two sums that need no other array as large as the keys.
    mean = self._mean(keys)
    variance = jnp.square(keys).mean(-1, keepdims=True) - jnp.square(mean)
    return jax.lax.rsqrt(jnp.maximum(variance, 0) + self.eps).squeeze(-1)

  def fold(self, query: jax.Array) -> jax.Array:
    """Returns queries [..., K] that score keys which are not normalized."""
    folded = self._scaled(query)
    return folded - self._mean(folded)

  def _scaled(self, x):
    return x * _expand(self.scale_K, x)

  def _mean(self, x):
    return x.mean(-1, keepdims=True) if self.kind == "layernorm" else 0


def _expand(x_K, like):
  """Returns x_K with the leading axes of like, each of length 1."""
  return jnp.expand_dims(x_K, range(like.ndim - 1))


def scored_keys(
  raw_PARNK: jax.Array, norm: KeyNorm | None, dtype: Any
) -> tuple[Keys, Callable[[jax.Array], jax.Array]]:
  """Returns the keys for training, and what to apply to queries first.

  Args:
    raw_PARNK: float32, the parameter.
    norm: of the keys; None: none.
    dtype: in which they are scored.
  """
  if norm is None or norm.bias or dtype != jnp.float32:
    return Keys(_normalized(raw_PARNK, norm, dtype)), lambda query: query
  # Normalized keys would be another array of that size, and several in the
  # backward. Only in float32: in bfloat16 the two forms round differently, and
  # a trained model would choose other rows when served.
  return Keys(raw_PARNK.astype(dtype), norm.inverse_std(raw_PARNK)), norm.fold


def prepared_keys(
  module: nn.Module,
  make: Callable[[], tuple[jax.Array, KeyNorm | None]],
  filter_PAR: jax.Array | None,
) -> Keys:
  """Returns the keys that `serve.prepare` normalized and merged.

  Args:
    module: an UltraMem layer with `prepared_for`.
    make: () -> (raw_PARNK, norm).
    filter_PAR: [P, A, R] float32, with which keys are merged.
  """
  c, dtype = module.config, module.dtype
  keys_PARNK = prepared.read(
    module, "keys", lambda: _normalized(*make(), dtype)
  )
  # A merged key in bfloat16 would be rounded, and choose other rows.
  merges = c.rank > 1 and not c.query_per_rank and dtype == jnp.float32
  if filter_PAR is None or not merges:
    return Keys(keys_PARNK)
  merged_PANK = prepared.read(
    module, "merged_keys", lambda: retrieval.merge_keys(keys_PARNK, filter_PAR)
  )
  return Keys(keys_PARNK, merged_PANK=merged_PANK)


def _normalized(raw_PARNK, norm, dtype):
  keys_PARNK = raw_PARNK if norm is None else norm(raw_PARNK)
  return keys_PARNK.astype(dtype)
