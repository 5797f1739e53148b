"""Causal depthwise convolution over positions, with a cache for decoding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

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
    zeros_BTD = jnp.zeros((batch, past, width), x_BTD.dtype)
    zeros_BT = jnp.zeros((batch, past), jnp.int32)
    if decode:
      is_initialized = self.has_variable("cache", "input")
      cached_BTD = self.variable("cache", "input", lambda: zeros_BTD)
      cached_BT = self.variable("cache", "segment", lambda: zeros_BT)
      x_BTD = jnp.concatenate([cached_BTD.value, x_BTD], axis=1)
      segment_BT = jnp.concatenate([cached_BT.value, segment_BT], axis=1)
      if is_initialized:
        cached_BTD.value = x_BTD[:, length:]
        cached_BT.value = segment_BT[:, length:]
    else:
      x_BTD = jnp.concatenate([zeros_BTD, x_BTD], axis=1)
      segment_BT = jnp.concatenate([zeros_BT, segment_BT], axis=1)
    y_BTD: Any = 0
    for tap in range(self.taps):
      window = slice(past - tap, past - tap + length)
      same_BT1 = (segment_BT[:, window] == segment_BT[:, past:])[..., None]
      tap_11D = kernel_SD[None, None, tap].astype(x_BTD.dtype)
      y_BTD += jnp.where(same_BT1, x_BTD[:, window], 0) * tap_11D
    return y_BTD
