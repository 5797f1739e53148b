"""The transformer, and where memory enters and leaves it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers import attention
from ultramem_jax.layers.convolution import CausalConv
from ultramem_jax.layers.linear import Linear
from ultramem_jax.layers.memory_plus import MemoryPlus
from ultramem_jax.layers.mlp import Mlp
from ultramem_jax.layers.moe import Moe
from ultramem_jax.layers.norm import make_norm
from ultramem_jax.layers.peer import Peer
from ultramem_jax.layers.tables import SHARED, SharedTables
from ultramem_jax.layers.ultramem import UltraMem
from ultramem_jax.layers.ultramem_v2 import UltraMemV2
from ultramem_jax.ops.residual import fork
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.model import ModelConfig

MEMORIES = {
  layer.KIND: layer for layer in (UltraMem, UltraMemV2, MemoryPlus, Peer)
}


class Embed(nn.Embed):
  """nn.Embed whose devices each look up their own tokens."""

  layout: Layout | None = None

  def __call__(self, tokens_BT: jax.Array) -> jax.Array:
    # Cast after the lookup, so that the gradient of a frequent token is summed
    # in float32.
    return layout_lib.over_tokens(
      lambda tokens_BT, table_VD: table_VD[tokens_BT].astype(self.dtype),
      tokens_BT,
      self.embedding,
      self.layout,
    )


class Block(nn.Module):
  """A transformer block: attention, then an MLP or a mixture of experts.

  Norms stand before each of the two, or after (`norm_position`), where its
  output joins the residual stream.

  Returns the residual stream and the tensor its MLP (or mixture of experts)
  read: normalized, unless norms stand after, and convolved over positions where
  `mlp_conv` says so. A memory placed at this block reads the same tensor.

  Attributes:
    config: the transformer's settings.
    layout, prepared_for: see `Transformer`.
    mlp_conv: taps of the convolution before the MLP; 0: none.
    adapter_dim: width of an adapter, which reads what the MLP reads; 0: none.
    has_mlp: False: a memory that reads here stands in its place.
  """

  config: ModelConfig
  layout: Layout | None = None
  prepared_for: str | None = None
  mlp_conv: int = 0
  adapter_dim: int = 0
  has_mlp: bool = True

  @nn.compact
  def __call__(
    self,
    x_BTD: jax.Array,
    segment_BT: jax.Array,
    rotation: tuple[jax.Array, jax.Array],
    decode: bool,
    deterministic: bool,
  ) -> tuple[jax.Array, jax.Array]:
    c = self.config
    dropout = nn.Dropout(c.dropout_rate, deterministic=deterministic)

    def norm(name, position, x_BTD):
      if c.norm_position != position:
        return x_BTD
      dtype = jnp.dtype(c.dtype)
      return make_norm(
        c.norm, c.norm_eps, c.norm_bias, name, "embed", dtype=dtype
      )(x_BTD)

    x_BTD, h_BTD = fork(x_BTD)
    h_BTD = norm("attention_norm", "pre", h_BTD)
    h_BTD = attention.Attention(c, self.prepared_for, name="attention")(
      h_BTD, segment_BT, rotation, decode
    )
    x_BTD += dropout(norm("attention_norm", "post", h_BTD))
    x_BTD, h_BTD = fork(x_BTD)
    h_BTD = norm("mlp_norm", "pre", h_BTD)
    if self.mlp_conv:
      h_BTD = CausalConv(self.mlp_conv, name="mlp_conv")(
        h_BTD, segment_BT, decode
      )
    if self.adapter_dim:
      x_BTD += dropout(
        Mlp(c, self.prepared_for, self.adapter_dim, name="adapter")(h_BTD)
      )
    if not self.has_mlp:
      return layout_lib.constrain_batch(x_BTD, self.layout), h_BTD
    if c.moe.num_experts:
      y_BTD = Moe(c, self.layout, name="moe")(h_BTD, segment_BT)
    else:
      y_BTD = Mlp(c, self.prepared_for, name="mlp")(h_BTD)
    y_BTD = dropout(norm("mlp_norm", "post", y_BTD))
    x_BTD = layout_lib.constrain_batch(x_BTD + y_BTD, self.layout)
    return x_BTD, h_BTD


class Transformer(nn.Module):
  """A causal language model, dense or with UltraMem layers.

  A memory with span (i, j) reads in block i what that block's MLP reads; its
  output joins the residual stream after block j. Nothing between i and j
  depends on it, so that look-up and dense layers may overlap (section 3.2).

  Attributes:
    config: the model's settings.
    layout: how arrays are split over a mesh; None: one device.
    prepared_for: the platform for which `serve.prepare` made the collection
      "prepared", which layers then read in place of some parameters: "cpu",
      "gpu", "tpu". None: all layers read parameters.
  """

  config: ModelConfig
  layout: Layout | None = None
  prepared_for: str | None = None

  @nn.compact
  def __call__(
    self,
    tokens_BT: jax.Array,
    segment_BT: jax.Array | None = None,
    position_BT: jax.Array | None = None,
    *,
    decode: bool = False,
    deterministic: bool = True,
  ) -> jax.Array:
    """Predicts each next token.

    Args:
      tokens_BT: [B, T] int32 in [0, V).
      segment_BT: [B, T] int32, the document of each position, from 1; 0 is
        padding. Attention and memory stay inside a document. None: all one.
      position_BT: [B, T] int32 rotary positions; None: 0, 1, ...
      decode: read and extend the collection "cache". Positions must then be
        given.
      deterministic: no dropout; otherwise a "dropout" key is needed.
    Returns:
      logits_BTV: [B, T, V] float32.
    Raises:
      ValueError: an array has another shape; or decoding without positions,
        or without a cache.
    """
    c = self.config
    _require_shapes(tokens_BT, segment_BT, position_BT)
    if decode and position_BT is None and not self.is_initializing():
      raise ValueError(
        "position_BT = None: must be given with decode, as the tokens may be "
        "any of a text"
      )
    dtype = jnp.dtype(c.dtype)
    if segment_BT is None:
      segment_BT = jnp.ones_like(tokens_BT)
    if position_BT is None:
      position_BT = jnp.broadcast_to(
        jnp.arange(tokens_BT.shape[1], dtype=jnp.int32), tokens_BT.shape
      )
    embed = self._embed()
    dropout = nn.Dropout(c.dropout_rate, deterministic=deterministic)
    x_BTD = layout_lib.constrain_batch(dropout(embed(tokens_BT)), self.layout)
    rotation = attention.rotation(c, position_BT)
    x_BTD = self._run_blocks(
      x_BTD, segment_BT, rotation, decode, deterministic, dropout
    )
    x_BTD = make_norm(
      c.norm, c.norm_eps, c.norm_bias, "final_norm", "embed", dtype=dtype
    )(x_BTD)
    if c.tie_embeddings:
      return embed.attend(x_BTD).astype(jnp.float32)
    return Linear(
      (c.vocab_size,),
      c.embed_dim**-0.5,
      ("embed", "vocab"),
      dtype=dtype,
      prepared_for=self.prepared_for,
      lora=c.lora,
      name="head",
    )(x_BTD).astype(jnp.float32)

  def _embed(self) -> Embed:
    c = self.config
    std = c.embed_dim**-0.5 if c.tie_embeddings else 1.0
    return Embed(
      c.vocab_size,
      c.embed_dim,
      dtype=jnp.dtype(c.dtype),
      name="embed",
      embedding_init=nn.with_logical_partitioning(
        nn.initializers.normal(std), ("vocab", "embed")
      ),
      layout=self.layout,
    )

  def _run_blocks(
    self, x_BTD, segment_BT, rotation, decode, deterministic, dropout
  ):
    """Runs the blocks, and the memories beside them."""
    c = self.config
    block_class = Block
    memory_class: Any = MEMORIES.get(c.memory.kind)
    if c.remat == "block":
      # Arguments are counted from self; the flags must stay Python values.
      block_class = nn.remat(Block, static_argnums=(4, 5))
      if memory_class:
        memory_class = nn.remat(memory_class, static_argnums=(3,))
    tables = None
    if c.memory.shares_table and c.spans:
      tables = SharedTables(c.memory, c.num_layers, name=SHARED)()
    outputs = {}  # of memories that were read and are not yet added
    for layer in range(c.num_layers):
      mlp_conv = c.mlp_conv if layer in c.mlp_conv_layers else 0
      x_BTD, h_BTD = block_class(
        c,
        self.layout,
        self.prepared_for,
        mlp_conv,
        c.adapter_dim if layer in c.adapter_layers else 0,
        layer in c.mlp_layers,
        name=f"block_{layer}",
      )(x_BTD, segment_BT, rotation, decode, deterministic)
      for span in c.spans:
        if span.start == layer:
          y_BTD = memory_class(
            c.memory,
            c.embed_dim,
            c.num_layers,
            span.index,
            jnp.dtype(c.dtype),
            self.layout,
            self.prepared_for,
            name=span.name,
          )(h_BTD, segment_BT, decode, tables)
          outputs[span.index] = dropout(y_BTD)
        if span.end == layer:
          x_BTD += outputs.pop(span.index)
    return x_BTD


def _require_shapes(tokens_BT, segment_BT, position_BT) -> None:
  """Raises ValueError if inputs of `Transformer` are not all [B, T]."""
  if tokens_BT.ndim != 2 or not tokens_BT.size:
    raise ValueError(
      f"tokens_BT has shape {tokens_BT.shape}: must be [B, T] with B and T at "
      "least 1"
    )
  for name, x in (("segment_BT", segment_BT), ("position_BT", position_BT)):
    if x is not None and x.shape != tokens_BT.shape:
      raise ValueError(
        f"{name} has shape {x.shape}: must be that of tokens_BT, "
        f"{tokens_BT.shape}"
      )
