"""A learned factor of what a memory adds to the residual stream."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers.parameter import parameter
from ultramem_jax.settings.memory import MemoryConfig


class Gate(nn.Module):
  """Multiplies what a memory adds by `scale`, or by a factor for each token.

    y *= scale * 2 sigmoid(<weight, x> + bias)

  With gate = "scalar" there is no sigmoid. The weight and the bias start at
  zero, where the factor is exactly the scale, which starts at 0 or 1
  (`gate_init`). A token's factor can then shut the gate, or double the scale.

  Sown when the collection "stats" is mutable: `mean` of the factor over tokens
  without padding.

  Attributes:
    config: of the memory; its gate is not "none".
  """

  config: MemoryConfig

  @nn.compact
  def __call__(
    self, x_BTD: jax.Array, y_BTD: jax.Array, segment_BT: jax.Array
  ) -> jax.Array:
    """Returns y times the factor.

    Args:
      x_BTD: [B, T, D], what the memory read.
      y_BTD: [B, T, D], what it adds.
      segment_BT: [B, T] int32; 0 is padding, which the mean leaves out.
    """
    zeros, ones = nn.initializers.zeros, nn.initializers.ones
    start = {"zero": zeros, "open": ones}[self.config.gate_init]
    factor_BT = jnp.broadcast_to(
      parameter(self, "scale", start, (), ()), segment_BT.shape
    )
    if self.config.gate == "input":
      shape = x_BTD.shape[-1:]
      weight_D = parameter(self, "weight", zeros, ("embed",), shape)
      bias = parameter(self, "bias", zeros, (), ())
      logit_BT = (x_BTD @ weight_D.astype(x_BTD.dtype)).astype(jnp.float32)
      factor_BT *= 2 * nn.sigmoid(logit_BT + bias)
    if not self.is_initializing():
      self.sow("stats", "mean", factor_BT.mean(where=segment_BT > 0))
    return y_BTD * factor_BT.astype(y_BTD.dtype)[..., None]
