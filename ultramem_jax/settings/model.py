"""The settings of the transformer, `config.model`."""

import dataclasses

from ultramem_jax.settings.checks import (
  require,
  require_at_least,
  require_at_most,
  require_choice,
  require_fraction,
  require_norm_eps,
  require_types,
)
from ultramem_jax.settings.lora import LoraConfig
from ultramem_jax.settings.memory import MemoryConfig
from ultramem_jax.settings.rope_scaling import RopeScaling
from ultramem_jax.settings.spans import Span, parse_blocks, parse_spans


@dataclasses.dataclass(frozen=True)
class MoeConfig:
  """The mixture of experts that replaces every MLP.

  Every field is explained in `configs/default.py`.
  """

  num_experts: int = 0
  top_k: int = 2
  expert_dim: int = 256
  balance_loss_weight: float = 0.01

  def __post_init__(self):
    path = "model.moe"
    require_types(path, self)
    require_at_least(path, self, 0, "num_experts", "balance_loss_weight")
    require_at_least(path, self, 1, "top_k", "expert_dim")
    require(
      self.num_experts == 0 or self.top_k <= self.num_experts,
      f"{path}.top_k",
      self.top_k,
      f"must be at most num_experts = {self.num_experts}",
    )


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The transformer; every field is explained in `configs/default.py`.

  A `num_kv_heads` or `head_dim` of 0 becomes the number that it stands for.
  """

  vocab_size: int
  embed_dim: int
  num_layers: int
  num_heads: int
  mlp_dim: int
  activation: str
  norm: str
  norm_eps: float
  norm_bias: bool
  qk_norm: str
  tie_embeddings: bool
  rope_theta: float
  dropout_rate: float
  dtype: str
  attention: str
  remat: str
  moe: MoeConfig
  memory: MemoryConfig
  mlp_conv: int = 0
  mlp_conv_blocks: str = "full"
  adapter_dim: int = 0
  adapter_blocks: str = "full"
  num_kv_heads: int = 0
  head_dim: int = 0
  qkv_bias: bool = False
  norm_position: str = "pre"
  sliding_window: int = 0
  rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
  lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

  @property
  def spans(self) -> tuple[Span, ...]:
    """Where the memories stand; () for a model without memory."""
    if self.memory.kind == "none":
      return ()
    return parse_spans(self.memory.spans, self.num_layers)

  @property
  def mlp_layers(self) -> tuple[int, ...]:
    """The blocks, from 0, that have an MLP or a mixture of experts."""
    replaced = {span.start for span in self.spans if self.memory.replace_mlp}
    return tuple(x for x in range(self.num_layers) if x not in replaced)

  @property
  def mlp_conv_layers(self) -> tuple[int, ...]:
    """The blocks, from 0, whose MLP reads convolved positions."""
    blocks = parse_blocks(
      "model.mlp_conv_blocks", self.mlp_conv_blocks, self.num_layers
    )
    return blocks if self.mlp_conv else ()

  @property
  def adapter_layers(self) -> tuple[int, ...]:
    """The blocks, from 0, that have an adapter."""
    blocks = parse_blocks(
      "model.adapter_blocks", self.adapter_blocks, self.num_layers
    )
    return blocks if self.adapter_dim else ()

  def __post_init__(self):
    self._require_ranges()
    self._require_choices()
    self._resolve_heads()
    # cuDNN's limits; GPUs before Hopper take at most 128.
    require(
      self.attention != "cudnn"
      or (self.head_dim % 8 == 0 and self.head_dim <= 256),
      "model.attention",
      self.attention,
      "needs heads whose width is a multiple of 8, and at most 256, not "
      f"{self.head_dim}",
    )
    self._require_memory()

  def _require_ranges(self):
    path = "model"
    require_types(path, self)
    require_at_least(
      path,
      self,
      0,
      "mlp_conv",
      "adapter_dim",
      "num_kv_heads",
      "head_dim",
      "sliding_window",
    )
    require_at_least(
      path,
      self,
      1,
      "vocab_size",
      "embed_dim",
      "num_layers",
      "num_heads",
      "mlp_dim",
    )
    # Every block is traced; more of them would take hours.
    require_at_most(path, self, 4096, "num_layers")
    require_fraction(path, self, "dropout_rate")
    require_norm_eps(path, self)
    require_at_least(path, self, 1, "rope_theta")
    require(
      self.rope_scaling.kind != "yarn" or self.rope_theta > 1,
      "model.rope_theta",
      self.rope_theta,
      "must be above 1 with rope_scaling.kind = 'yarn'",
    )
    _ = self.mlp_conv_layers, self.adapter_layers  # raises on a bad block

  def _require_choices(self):
    path = "model"
    require_choice(path, self, "activation", "gelu", "swiglu")
    require_choice(path, self, "norm", "layernorm", "rms")
    require_choice(path, self, "norm_position", "pre", "post")
    require_choice(path, self, "qk_norm", "none", "head", "width")
    require_choice(path, self, "dtype", "float32", "bfloat16")
    require_choice(path, self, "attention", "xla", "cudnn")
    require_choice(path, self, "remat", "none", "block")
    require(
      self.attention != "cudnn" or self.dtype == "bfloat16",
      "model.attention",
      self.attention,
      "needs model.dtype = 'bfloat16'",
    )

  def _resolve_heads(self):
    """Requires heads to fit together; replaces zeros by what they stand for."""
    if self.head_dim:
      require(
        self.head_dim % 2 == 0,
        "model.head_dim",
        self.head_dim,
        "must be even, as rotary positions turn pairs; 0 is embed_dim / "
        "num_heads",
      )
    else:
      width = self.embed_dim // self.num_heads
      require(
        self.embed_dim % self.num_heads == 0 and width % 2 == 0,
        "model.num_heads",
        self.num_heads,
        f"must divide embed_dim = {self.embed_dim} into an even head width, "
        "unless model.head_dim names another",
      )
      object.__setattr__(self, "head_dim", width)
    kv_heads = self.num_kv_heads or self.num_heads
    require(
      self.num_heads % kv_heads == 0,
      "model.num_kv_heads",
      kv_heads,
      f"must divide num_heads = {self.num_heads}; 0 means num_heads",
    )
    object.__setattr__(self, "num_kv_heads", kv_heads)

  def _require_memory(self):
    """Requires the memories to fit the transformer."""
    memory = self.memory
    if memory.kind != "none":
      require(
        bool(memory.spans),
        "model.memory.spans",
        memory.spans,
        "must name at least one span, such as '1:2'",
      )
      memory.require_width(self.embed_dim)
    spans = self.spans  # raises on a bad span
    require(
      self.moe.num_experts == 0 or not memory.replace_mlp,
      "model.memory.replace_mlp",
      memory.replace_mlp,
      "is for plain MLPs: needs model.moe.num_experts = 0",
    )
    if memory.kind == "ultramem_v2":
      require(
        memory.ring_layers in (0, len(spans)),
        "model.memory.ring_layers",
        memory.ring_layers,
        f"must be 0 or the number of spans, {len(spans)}",
      )
      memory = dataclasses.replace(memory, ring_layers=len(spans))
      object.__setattr__(self, "memory", memory)
