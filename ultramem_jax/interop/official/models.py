"""Imports and exports a whole model of the authors."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from ultramem_jax.interop.files import load
from ultramem_jax.interop.official.arrays import read, write
from ultramem_jax.interop.official.layers import KINDS
from ultramem_jax.interop.official.settings import (
  Settings,
  norm_settings,
  require_value,
  required,
)
from ultramem_jax.interop.official.ultramem import norm_entries, table_entries
from ultramem_jax.interop.tensors import Entry, Path, linear, make_entry
from ultramem_jax.layers import tables
from ultramem_jax.model import Transformer
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.memory import NO_MEMORY, MemoryConfig
from ultramem_jax.settings.model import ModelConfig, MoeConfig
from ultramem_jax.settings.spans import parse_spans

# Fields of the authors' model config that, where set, must have one of these
# values. All values of a field mean the same.
MODEL_SETTINGS = {
  "activation_type": ("swiglu",),
  "block_type": ("sequential",),
  "rope": (True,),
  "alibi": (False,),
  "norm_after": (False,),
  "scale_logits": (False,),
  "clip_qkv": (None,),
  "include_bias": (False,),
  "embedding_layer_norm": (False,),
  "layer_norm_with_affine": (True,),
  "block_group_size": (1,),
  "moe_interleave": (False,),
  "attention_dropout": (0,),
  "residual_dropout": (0,),
  "embedding_dropout": (0,),
}
# Defaults of the constructor of V1 layers: the authors' model never passes
# these arguments on.
V1_TUCKER_RANK, V1_NUM_CORES, V1_EXPANSION = 2, 2, 4


def _spans(settings: Settings) -> str:
  """Returns `model.memory.spans`; "" for a model without memory.

  `mem_insert_way` counts blocks from 0, our spans count them from 1.
  """
  way = required(settings, "mem_insert_way")
  if way == "no_mem":
    return ""
  if way == "full":
    return way
  parts = [span.split(":") for span in way.split("/")]
  require(
    all(len(p) == 2 and all(x.isdecimal() for x in p) for p in parts),
    "mem_insert_way",
    way,
    "must be full, no_mem or 'i:j' parts joined by '/'",
  )
  spans = "/".join(f"{int(i) + 1}:{int(j) + 1}" for i, j in parts)
  try:
    parse_spans(spans, required(settings, "n_layers"))
  except ConfigError as error:
    raise ConfigError(
      f"mem_insert_way = {way!r}: counted from 1, {error}"
    ) from error
  return spans


def _memory(
  settings: Settings, spans: str, sizes: dict[str, int]
) -> MemoryConfig:
  """Returns the config of the memories, by the config of their layer.

  Args:
    settings: the authors' model config, whose mem_* fields are the settings of
      a layer under other names.
    spans: where the memories stand.
    sizes: see `_memory_sizes`.
  """
  kind = required(settings, "mem_type")
  require(
    kind in KINDS and kind != "meta_memory",
    "mem_type",
    kind,
    "must be ultramem_v1, ultramem_v2 or memory_plus",
  )
  renamed = {
    name: required(settings, f"mem_{name}")
    for name in ("knum", "kdim", "vdim", "knn")
  }
  layers = settings["n_layers"] if spans == "full" else spans.count("/") + 1
  c = KINDS[kind].config(
    {
      **settings,
      **renamed,
      **sizes,
      "mem_layer_num": layers,
      "head": settings.get("mem_head", 1),
      "pre_vdim": settings.get("mem_pre_vdim", 0),
      "share_ratio": settings.get("mem_share_ratio", 1.0),
    }
  )
  return dataclasses.replace(c, spans=spans)


def _kv_heads(settings: Settings, heads: int) -> int:
  """Returns the heads of keys and values."""
  given = settings.get("n_kv_heads")
  single = settings.get("multi_query_attention")
  kv_heads = given or (1 if single else heads)
  require(
    heads % kv_heads == 0
    and (single is None or kv_heads == (1 if single else heads)),
    "n_kv_heads",
    given,
    f"must divide n_heads = {heads}, and fit multi_query_attention = {single}",
  )
  return kv_heads


def _model_config(settings: Settings, sizes: dict[str, int]) -> ModelConfig:
  """Returns the config of the model; sizes: see `_memory_sizes`."""
  for name, allowed in MODEL_SETTINGS.items():
    require_value(
      settings,
      name,
      allowed,
      f"must be {allowed[0]}: nothing else is supported",
    )
  width, heads = (required(settings, n) for n in ("d_model", "n_heads"))
  kv_heads = _kv_heads(settings, heads)
  norm, eps, bias = norm_settings(settings)
  spans = _spans(settings)
  hidden = settings.get("mlp_hidden_size")
  if hidden is None:
    hidden = settings.get("mlp_ratio", 4) * width
  return ModelConfig(
    vocab_size=settings.get("embedding_size")
    or required(settings, "vocab_size"),
    embed_dim=width,
    num_layers=required(settings, "n_layers"),
    num_heads=heads,
    num_kv_heads=kv_heads,
    mlp_dim=hidden // 2,
    activation="swiglu",
    norm=norm,
    norm_eps=eps,
    norm_bias=bias,
    qk_norm="head" if settings.get("attention_layer_norm") else "none",
    tie_embeddings=settings.get("weight_tying", True),
    rope_theta=float(settings.get("rope_theta", 10_000)),
    dropout_rate=0.0,
    dtype="float32",
    attention="xla",
    remat="none",
    moe=MoeConfig(),
    memory=_memory(settings, spans, sizes) if spans else NO_MEMORY,
  )


def _nested(
  entries: dict[str, Entry], prefix: str, module: str
) -> dict[str, Entry]:
  """Returns the entries of a layer as those of a model that holds it.

  Args:
    entries: of the layer.
    prefix: stands before the names of the tensors in the model.
    module: our name of the layer in the model.
  """

  def nest(path: Path) -> Path:
    return (path[0], module, *path[1:])

  return {
    f"{prefix}{name}": entry._replace(paths=tuple(map(nest, entry.paths)))
    for name, entry in entries.items()
  }


def _block_entries(c: ModelConfig) -> dict[str, Entry]:
  """Returns the tensors of a block, with paths as if it were the model."""
  width, hidden = c.embed_dim, c.mlp_dim
  heads = (c.num_heads, c.head_dim)
  parts = (c.num_heads, c.num_kv_heads, c.num_kv_heads)
  kernels = [
    ("params", "attention", name, "kernel")
    for name in ("query", "key", "value", "out")
  ]
  ups = [("params", "mlp", name, "kernel") for name in ("up", "gate")]
  entries = {
    "att_proj.weight": make_entry(
      *kernels[:3],
      split=(sum(parts), c.head_dim, width),
      parts=parts,
      axes=(2, 0, 1),
      shape=(sum(parts) * c.head_dim, width),
    ),
    "attn_out.weight": make_entry(
      kernels[3], split=(width, *heads), axes=(1, 2, 0), shape=(width, width)
    ),
    "ff_proj.weight": make_entry(
      *ups, split=(2 * hidden, width), parts=(hidden, hidden), axes=(1, 0)
    ),
    "ff_out.weight": linear(("params", "mlp", "down", "kernel"), width, hidden),
  }
  norms: dict[str, tuple[Path, int]] = {
    "attn_norm": (("attention_norm",), width),
    "ff_norm": (("mlp_norm",), width),
  }
  if c.qk_norm == "head":
    norms["q_norm"] = (("attention", "query_norm"), c.head_dim)
    norms["k_norm"] = (("attention", "key_norm"), c.head_dim)
  for name, (path, size) in norms.items():
    entries |= norm_entries(name, ("params", *path), size, c.norm_bias)
  return entries


def _model_entries(c: ModelConfig) -> dict[str, Entry]:
  """Returns the tensors of the whole model, by name."""
  width, vocabulary = c.embed_dim, c.vocab_size
  entries = {
    "transformer.wte.weight": make_entry(
      ("params", "embed", "embedding"), split=(vocabulary, width)
    ),
    **norm_entries(
      "transformer.ln_f", ("params", "final_norm"), width, c.norm_bias
    ),
  }
  if not c.tie_embeddings:
    entries["transformer.ff_out.weight"] = linear(
      ("params", "head", "kernel"), vocabulary, width
    )
  for layer in range(c.num_layers):
    entries |= _nested(
      _block_entries(c), f"transformer.blocks.{layer}.", f"block_{layer}"
    )
  if c.spans:
    kind = "ultramem_v1" if c.memory.kind == "ultramem" else c.memory.kind
    memory = KINDS[kind].entries(c.memory, width)
    for span in c.spans:
      theirs = f"transformer.mem_blocks.{span.index}."
      entries |= _nested(memory, theirs, span.name)
    if c.memory.shares_table:
      theirs = "transformer.full_memory_layer."
      entries |= table_entries(c.memory, theirs, tables.SHARED)
  return entries


def _memory_sizes(
  settings: Settings, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
  """Returns rank, cores and projections of the memories, from the tensors.

  The authors' model config does not decide them: V1 layers always have the
  defaults of their constructor. Where a tensor is absent we take those, too.

  Args:
    settings: the authors' model config.
    shapes: of the model's tensors, by name.
  """
  prefix = "transformer.mem_blocks.0."
  cores = sum(name.startswith(f"{prefix}tucker_core.") for name in shapes)
  keys = shapes.get(f"{prefix}keys", ())
  projection = shapes.get(f"{prefix}values_proj.weight", ())
  projections = (
    V1_EXPANSION
    if settings.get("mem_type") == "ultramem_v1"
    else settings.get("mem_value_expand_time", 1)
  )
  if len(projection) == 2:
    projections = projection[1] // required(settings, "mem_vdim")
  return {
    "tucker_rank": keys[-1] if len(keys) == 5 else V1_TUCKER_RANK,
    "tucker_multihead": cores or V1_NUM_CORES,
    "value_expand_time": projections,
  }


def from_official_model(
  settings: Settings, state_dict: Any
) -> tuple[Transformer, Any]:
  """Returns a Transformer that computes what the authors' whole model does.

  Args:
    settings: the fields of the authors' model config.
    state_dict: as in `from_official`.
  Returns:
    (model, variables), so that model.apply(variables, tokens_BT) is the logits.
  Raises:
    ConfigError: as `from_official`.
  """
  arrays = load(state_dict)
  shapes = {name: np.shape(array) for name, array in arrays.items()}
  c = _model_config(settings, _memory_sizes(settings, shapes))
  return Transformer(c), read(_model_entries(c), arrays)


def to_official_model(
  settings: Settings, variables: Any
) -> dict[str, np.ndarray]:
  """Returns the authors' tensors: the inverse of `from_official_model`.

  Args:
    settings: as in `from_official_model`.
    variables: {"params": ..., "buffers": ...} of the model.
  Returns:
    {name: numpy array}.
  Raises:
    ConfigError: as `to_official`.
  """
  memory = nn.unbox(variables)["params"].get("memory_0")
  shapes = {}
  if memory is not None:
    # The shapes of the tensors that `_memory_sizes` reads.
    prefix = "transformer.mem_blocks.0."
    sides, heads, rank, num_keys, key_dim = memory["keys"].shape
    shapes[f"{prefix}keys"] = (heads, sides, num_keys, key_dim, rank)
    projections, width, embed_dim = memory["value_projection"].shape
    shapes[f"{prefix}values_proj.weight"] = (embed_dim, projections * width)
    for core in range(len(memory.get("core", ()))):
      shapes[f"{prefix}tucker_core.{core}"] = ()
  c = _model_config(settings, _memory_sizes(settings, shapes))
  return write(_model_entries(c), variables)
