"""The feed-forward layer."""

import flax.linen as nn
import jax.numpy as jnp

from ultramem_jax.config import ModelConfig


class Mlp(nn.Module):
  """gelu(x W_up) W_down, or (silu(x W_gate) * x W_up) W_down with swiglu."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BTD):
    c = self.config

    def dense(name, width, std, axes):
      initializer = nn.initializers.normal(std)
      return nn.Dense(
          width, use_bias=False, dtype=jnp.dtype(c.dtype), name=name,
          kernel_init=nn.with_logical_partitioning(initializer, axes),
      )

    into = (c.mlp_dim, c.embed_dim**-0.5, ("embed", "mlp"))
    h_BTF = dense("up", *into)(x_BTD)
    if c.activation == "swiglu":
      h_BTF = nn.silu(dense("gate", *into)(x_BTD)) * h_BTF
    else:
      h_BTF = nn.gelu(h_BTF)
    out_std = (2 * c.num_layers * c.mlp_dim) ** -0.5
    return dense("down", c.embed_dim, out_std, ("mlp", "embed"))(h_BTF)
