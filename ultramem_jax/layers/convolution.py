"""Causal depthwise convolution over positions, with a cache for decoding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers.cache import has_cache
from ultramem_jax.layers.parameter import parameter


class CausalConv(nn.Module):
  """Causal depthwise convolution: y[t] = sum_j w[j] * x[t - j], j < taps.

  A tap reaches only positions of its own segment. In decoding, the last
  taps - 1 inputs and their segments are kept in the "cache" collection.

  Attributes:
    taps: S, at least 1; w is the parameter `kernel` [S, D].
  """

  taps: int

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, segment_BT: jax.Array, decode: bool
  ) -> jax.Array:
    """Convolves the positions of each row.

    Args:
      x_BTD: [B, T, D] float.
      segment_BT: [B, T] int32, the document of each position.
      decode: continue the sequence in the cache.
    Returns:
      [B, T, D] in the dtype of x.
    Raises:
      ValueError: decoding without a cache.
    """
    batch, length, width = x_BTD.shape
    past = self.taps - 1
    kernel_SD = parameter(
      self,
      "kernel",
      nn.initializers.normal(self.taps**-0.5),
      (None, "embed"),
      (self.taps, width),
    )
    past_BsD = jnp.zeros((batch, past, width), x_BTD.dtype)
    past_Bs = jnp.zeros((batch, past), jnp.int32)
    if decode:
      is_initialized = has_cache(self, "input")
      inputs = self.variable("cache", "input", lambda: past_BsD)
      segments = self.variable("cache", "segment", lambda: past_Bs)
      past_BsD, past_Bs = inputs.value, segments.value
    # T from the first position of the past on.
    padded_BTD = jnp.concatenate([past_BsD, x_BTD], axis=1)
    padded_BT = jnp.concatenate([past_Bs, segment_BT], axis=1)
    if decode and is_initialized:
      inputs.value = padded_BTD[:, length:]
      segments.value = padded_BT[:, length:]
    y_BTD: Any = 0
    for tap in range(self.taps):
      window = slice(past - tap, past - tap + length)
      same_BT1 = (padded_BT[:, window] == segment_BT)[..., None]
      tap_11D = kernel_SD[None, None, tap].astype(x_BTD.dtype)
      y_BTD += jnp.where(same_BT1, padded_BTD[:, window], 0) * tap_11D
    return y_BTD
