"""The feed-forward layer."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers.linear import Linear
from ultramem_jax.settings.model import ModelConfig


class Mlp(nn.Module):
  """gelu(x W_up) W_down; with swiglu, (silu(x W_gate) * x W_up) W_down.

  Its matrices are the linear maps `up`, `down` and, with swiglu, `gate`.

  Attributes:
    config: the model's settings.
    prepared_for: see `model.Transformer`.
    adapter_dim: F of an adapter, an MLP beside that of a block (arXiv
      2110.04366), which adds nothing at first: its W_down starts at zero. 0:
      the block's own MLP.
  """

  config: ModelConfig
  prepared_for: str | None = None
  adapter_dim: int = 0

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    """Returns [B, T, D] for the positions x_BTD, in the model's dtype."""
    c = self.config
    linear = functools.partial(
      Linear,
      dtype=jnp.dtype(c.dtype),
      prepared_for=self.prepared_for,
      lora=c.lora,
    )
    mlp_dim = self.adapter_dim or c.mlp_dim
    into = (mlp_dim,), c.embed_dim**-0.5, ("embed", "mlp")
    h_BTF = linear(*into, name="up")(x_BTD)
    if c.activation == "swiglu":
      h_BTF *= nn.silu(linear(*into, name="gate")(x_BTD))
    else:
      h_BTF = nn.gelu(h_BTF)
    out_std = 0.0 if self.adapter_dim else (2 * c.num_layers * mlp_dim) ** -0.5
    return linear((c.embed_dim,), out_std, ("mlp", "embed"), name="down")(h_BTF)
