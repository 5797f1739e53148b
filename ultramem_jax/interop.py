"""The authors' PyTorch weights, as numpy arrays under their own names.

  layer, variables = from_official("ultramem_v1", state_dict, **settings)
  named = to_official("ultramem_v1", variables, **settings)

A layer is described by a table of `Entry`, one for each of their tensors: how
its axes are split and moved, and which arrays of ours result. The tables are
linear in the arrays, so that they carry gradients over as well as parameters.

Their settings are constructor arguments and fields of their configuration in
one dict. A setting that does not change what the layer computes is ignored,
one that we cannot express is refused by name.
"""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from ultramem_jax.config import (
    ConfigError,
    MemoryConfig,
    ModelConfig,
    MoeConfig,
    parse_spans,
    require,
)
from ultramem_jax.layers.memory_plus import MemoryPlus
from ultramem_jax.layers.ultramem import UltraMem
from ultramem_jax.layers.ultramem_v2 import UltraMemV2
from ultramem_jax.model import Transformer

Path = tuple[str | int, ...]
Settings = Mapping[str, Any]

# Heads that read one query pair, a constant of the authors' code.
HEADS_PER_QUERY = 2


class Entry(NamedTuple):
  """One tensor of theirs and the arrays of ours that hold it.

  ours = theirs.reshape(split).transpose(axes); with several paths, that
  array's first axis runs over them. A path that ends in a number is that
  element of the array at the rest of the path.
  """

  shape: tuple[int, ...]
  split: tuple[int, ...]
  axes: tuple[int, ...]
  paths: tuple[Path, ...]

  def read(self, theirs: np.ndarray) -> dict[Path, np.ndarray]:
    """Our arrays, by path."""
    ours = theirs.reshape(self.split).transpose(self.axes)
    parts = [ours] if len(self.paths) == 1 else ours
    return dict(zip(self.paths, parts, strict=True))

  def write(self, ours: Mapping[Path, np.ndarray]) -> np.ndarray:
    """Their tensor, from our arrays by path."""
    parts = [ours[path] for path in self.paths]
    array = parts[0] if len(parts) == 1 else np.stack(parts)
    moved = [self.split[axis] for axis in self.axes]
    return (
        array.reshape(moved).transpose(np.argsort(self.axes))
        .reshape(self.shape)
    )


def _entry(*paths: Path, split, axes=None, shape=None) -> Entry:
  axes = tuple(range(len(split))) if axes is None else axes
  return Entry(split if shape is None else shape, split, axes, paths)


def _linear(path: Path, outputs: int, inputs: int) -> Entry:
  """A torch linear weight [out, in] as our kernel [in, out]."""
  return _entry(path, split=(outputs, inputs), axes=(1, 0))


# What a setting must be where we cannot express anything else.


def _required(settings: Settings, name: str) -> Any:
  require(name in settings, name, None, "is missing from the settings")
  return settings[name]


def _only(settings: Settings, name: str, allowed: tuple, why: str) -> None:
  value = settings.get(name, allowed[0])
  require(value in allowed, name, value, why)


def _norm_settings(settings: Settings) -> tuple[str, float, bool]:
  """(kind, eps, bias) of their norms; a missing type means rms."""
  kind = str(settings.get("layer_norm_type") or "rms")
  kinds = {"rms": "rms", "default": "layernorm", "low_precision": "layernorm"}
  require(kind in kinds, "layer_norm_type", kind,
          f"must be one of {', '.join(kinds)}")
  bias = settings.get("bias_for_layer_norm")
  if bias is None:
    bias = settings.get("include_bias", False)
  return kinds[kind], settings.get("layer_norm_eps", 1e-5), bool(bias)


def _query_key_norm(settings: Settings) -> dict[str, Any]:
  name = "attention_layer_norm_with_affine"
  if settings.get(name, True) is None:
    name = "layer_norm_with_affine"
  _only(settings, name, (True,), "must be true: norms have a weight")
  kind, eps, bias = _norm_settings(settings)
  return {"query_key_norm": kind, "norm_eps": eps, "norm_bias": bias}


# The three kinds of layer: their settings as ours, and their tensors.


def _ultramem_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  """Tensors that V1, V2 and Memory+ name alike."""
  width, heads, projections = c.value_dim, c.num_heads, c.projections
  query = (c.num_queries, 2, 1, c.key_dim, embed_dim)
  keys = (heads, 2, c.grid_side, c.key_dim, c.rank)
  entries = {
      "query_proj.weight": _entry(
          ("params", "query"), split=query, axes=(4, 1, 0, 2, 3),
          shape=(math.prod(query[:-1]), embed_dim),
      ),
      "keys": _entry(
          ("params", "keys"), split=keys, axes=(1, 0, 4, 2, 3),
          shape=keys if c.score == "tucker" else keys[:-1],
      ),
      "values_proj.weight": _entry(
          ("params", "value_projection"),
          split=(embed_dim, projections, width), axes=(1, 2, 0),
          shape=(embed_dim, projections * width),
      ),
  }
  for ours, theirs in (("query_norm", "query_norm"), ("key_norm", "keys_norm")):
    entries |= _norm_entries(theirs, ("params", ours), c.key_dim, c.norm_bias)
  return entries


def _norm_entries(name: str, path: Path, size: int, bias: bool):
  """Of a norm: {name.weight: ..., name.bias: ...}."""
  names = {"weight": "scale", "bias": "bias"} if bias else {"weight": "scale"}
  return {
      f"{name}.{theirs}": _entry((*path, ours), split=(size,))
      for theirs, ours in names.items()
  }


def _tucker_entries(c: MemoryConfig) -> dict[str, Entry]:
  """Cores, filter vectors and shuffle of V1 and V2."""
  heads, rank = c.num_heads, c.rank
  entries = {
      f"tucker_core.{core}": _entry(
          ("params", "core", core), split=(heads, rank, rank)
      )
      for core in range(c.num_cores)
  }
  for ours, theirs in (("u", "tucker_core_u"), ("t", "tucker_core_v")):
    entries[theirs] = _entry(
        ("buffers", ours), split=(heads, rank), shape=(1, heads, 1, rank)
    )
  entries["shuffle_index"] = _entry(
      ("buffers", "permutation"), split=(c.grid_side**2,)
  )
  return entries


def _table_entries(c: MemoryConfig, prefix: str, *path: str):
  """Of the table and the pre-values, under prefix and path."""
  widths = {"values": c.value_dim}
  if c.pre_value_dim:
    widths["pre_values"] = c.pre_value_dim
  return {
      f"{prefix}{name}_for_look_up": _entry(
          ("params", *path, name), split=(c.num_rows, width)
      )
      for name, width in widths.items()
  }


def _sizes(settings: Settings) -> dict[str, Any]:
  """Settings that V1, V2 and Memory+ name alike."""
  return {
      "num_keys": _required(settings, "knum"),
      "key_dim": _required(settings, "kdim"),
      "value_dim": _required(settings, "vdim"),
      "top_m": _required(settings, "knn"),
      "num_heads": settings.get("head", 1),
      **_query_key_norm(settings),
  }


def _tucker_config(settings: Settings, pairs: int, **fields) -> MemoryConfig:
  """Of V1 or V2, with so many query pairs, each read by two heads."""
  sizes = _sizes(settings)
  heads = sizes["num_heads"]
  require(1 <= heads <= HEADS_PER_QUERY * pairs, "head", heads,
          f"must be at most {HEADS_PER_QUERY * pairs}: two heads read a pair "
          f"of queries, of which there are {pairs}")
  return MemoryConfig(
      **sizes, **fields, heads_per_query=min(HEADS_PER_QUERY, heads),
      spare_queries=pairs - math.ceil(heads / HEADS_PER_QUERY),
      query_per_rank=False, tucker_rank=settings.get("tucker_rank", 2),
      num_cores=settings.get("tucker_multihead", 2), shuffle="permutation",
      query_conv=0, init="official",
  )


def _v1_config(settings: Settings) -> MemoryConfig:
  expansion = settings.get("value_expand_time", 4)
  require(math.isqrt(expansion) ** 2 == expansion, "value_expand_time",
          expansion, "must be a perfect square")
  return _tucker_config(settings, pairs=1, expansion=expansion)


def _v2_config(settings: Settings) -> MemoryConfig:
  expansion = settings.get("mem_key_expand_time", 1) ** 2
  projections = settings.get("value_expand_time", 4)
  require(projections in (1, expansion), "value_expand_time", projections,
          f"must be 1 or mem_key_expand_time^2 = {expansion}")
  _only(settings, "mem_key_balance_reg_coef", (0, None),
        "must be 0: the balance loss of keys, which is part of their "
        "gradients, is not supported")
  _only(settings, "mem_output_dropout_rate", (0, None),
        "must be 0: dropout inside the layer is not supported")
  rank = settings.get("tucker_rank", 2)
  return _tucker_config(
      settings, kind="ultramem_v2", expansion=expansion,
      num_projections=projections,
      pairs=rank if settings.get("mem_q_for_each_tucker_rank") else 1,
      ring_layers=settings.get("mem_layer_num", 1),
      share_ratio=float(settings.get("share_ratio", 1)),
      pre_value_dim=settings.get("pre_vdim", 0),
      pre_activation="gelu" if settings.get("mem_use_glu_act") else "none",
  )


def _memory_plus_config(settings: Settings) -> MemoryConfig:
  return MemoryConfig(kind="memory_plus", **_sizes(settings))


def _v1_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  return {
      **_ultramem_entries(c, embed_dim), **_tucker_entries(c),
      **_table_entries(c, ""),
  }


def _v2_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  entries = _ultramem_entries(c, embed_dim) | _tucker_entries(c)
  if c.pre_value_dim:
    entries["pre_values_proj.weight"] = _linear(
        ("params", "pre_projection"), c.pre_value_dim, embed_dim
    )
  return entries


def _memory_plus_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  return {
      **_ultramem_entries(c, embed_dim),
      "swilu_projection.weight": _linear(
          ("params", "gate", "kernel"), c.value_dim, embed_dim
      ),
  }


# Meta's layer (facebookresearch/memory, lingua/product_key/memory.py).


def _meta_config(settings: Settings) -> MemoryConfig:
  width = _meta_width(settings)
  sides = settings.get("mem_k_dim", 512)
  require(sides % 2 == 0, "mem_k_dim", sides, "must be even")
  _only(settings, "mem_query_batchnorm", (False,),
        "must be false: batch normalization is not supported")
  _only(settings, "peer_variant", (False,),
        "must be false: PEER weights are not supported")
  for name in ("mem_input_dropout", "mem_query_dropout", "mem_value_dropout"):
    _only(settings, name, (0,), "must be 0: dropout is not supported")
  gated = settings.get("swilu_projection", True)
  return MemoryConfig(
      kind="memory_plus", num_keys=settings.get("mem_n_keys", 1024),
      key_dim=sides // 2, value_dim=width, top_m=settings.get("mem_knn", 32),
      num_heads=settings.get("mem_heads", 4), query_key_norm="none",
      query_bias=settings.get("mem_query_bias", True), input_gate=gated,
      value_projection=gated or settings.get("mem_v_dim", -1) > 0,
      projection_bias=True, output_gate=settings.get("mem_gated", False),
  )


def _meta_width(settings: Settings) -> int:
  """Width of a value."""
  inputs, outputs = (_required(settings, f"{n}put_dim") for n in ("in", "out"))
  require(inputs == outputs, "output_dim", outputs,
          f"must equal input_dim = {inputs}")
  width = settings.get("mem_v_dim", -1)
  return width if width > 0 else outputs


def _meta_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  heads, sides, width = c.num_heads, c.grid_side, c.value_dim
  query = (heads, 2, 1, c.key_dim)
  outputs = math.prod(query)
  entries = {
      "keys": _entry(
          ("params", "keys"), split=(heads, 2, sides, c.key_dim, 1),
          axes=(1, 0, 4, 2, 3), shape=(heads * 2 * sides, c.key_dim),
      ),
      "values.weight": _entry(
          ("params", "values"), split=(c.num_rows, width)
      ),
      "query_proj.query_mlps.0.weight": _entry(
          ("params", "query"), split=(*query, embed_dim),
          axes=(4, 1, 0, 2, 3), shape=(outputs, embed_dim),
      ),
  }
  if c.query_bias:
    entries["query_proj.query_mlps.0.bias"] = _entry(
        ("params", "query_bias"), split=query, axes=(1, 0, 2, 3),
        shape=(outputs,),
    )
  if c.value_projection:
    entries["value_proj.weight"] = _entry(
        ("params", "value_projection"), split=(embed_dim, 1, width),
        axes=(1, 2, 0), shape=(embed_dim, width),
    )
    entries["value_proj.bias"] = _entry(
        ("params", "value_projection_bias"), split=(embed_dim,)
    )
  if c.input_gate:
    entries |= _biased("swilu_projection", "gate", width, embed_dim)
  if c.output_gate:
    entries |= _biased("gating", "output_gate", 1, embed_dim)
  return entries


def _biased(theirs: str, ours: str, outputs: int, inputs: int):
  """A torch linear map with a bias, and our nn.Dense."""
  return {
      f"{theirs}.weight": _linear(("params", ours, "kernel"), outputs, inputs),
      f"{theirs}.bias": _entry(("params", ours, "bias"), split=(outputs,)),
  }


class Kind(NamedTuple):
  """A layer of theirs: settings -> ours, its tensors, its width's name."""

  layer: type[UltraMem]
  config: Callable[[Settings], MemoryConfig]
  entries: Callable[[MemoryConfig, int], dict[str, Entry]]
  width: str = "hidden_size"


KINDS = {
    "ultramem_v1": Kind(UltraMem, _v1_config, _v1_entries),
    "ultramem_v2": Kind(UltraMemV2, _v2_config, _v2_entries),
    "memory_plus": Kind(MemoryPlus, _memory_plus_config, _memory_plus_entries),
    "meta_memory": Kind(MemoryPlus, _meta_config, _meta_entries, "input_dim"),
}


def _layer(kind: str, settings: Settings) -> tuple[UltraMem, dict[str, Entry]]:
  """The layer of ours, and the tensors of theirs."""
  require(kind in KINDS, "kind", kind, f"must be one of {', '.join(KINDS)}")
  layer_class, config, entries, width = KINDS[kind]
  embed_dim = _required(settings, width)
  c = config(settings)
  layer = layer_class(c, embed_dim, layer_index=settings.get("layer_id", 0))
  tensors = entries(c, embed_dim)
  if kind in ("ultramem_v2", "memory_plus"):
    tensors |= _table_entries(c, "full_memory_layer.")
  return layer, tensors


def from_official(kind: str, state_dict: Any, /, **settings: Any):
  """The authors' layer as one of ours.

  Args:
    kind: "ultramem_v1", "ultramem_v2", "memory_plus" or "meta_memory" (Meta's
      HashingMemory). The first three are classes of the UltraMem authors.
    state_dict: parameters and buffers as numpy arrays by name, or the path of
      a .safetensors or .pt file. V2's and Memory+'s table stands under
      "full_memory_layer.".
    **settings: the constructor's arguments and the fields of its config.
      Those that do not change what the layer computes are ignored.
  Returns:
    (layer, variables): layer.apply(variables, x_BTD) is their output.
  Raises:
    ConfigError: a setting that we cannot express, by name; or tensors that are
      missing, unknown or wrongly shaped, all in one message.
  """
  layer, entries = _layer(kind, settings)
  return layer, _read(entries, load(state_dict))


def to_official(kind: str, variables: Any, /, **settings: Any):
  """Their tensors by name, from ours: the inverse of `from_official`.

  Linear in the parameters, so that it renames gradients as well. A collection
  that variables lacks, such as the buffers of a gradient, is left out.

  Args:
    kind, settings: of `from_official`.
    variables: {"params": ..., "buffers": ...} of the layer.
  Returns:
    {name: numpy array}.
  Raises:
    ConfigError: as `from_official`, of our arrays.
  """
  return _write(_layer(kind, settings)[1], variables)


# Whole models.

# Fields of their model config that must have the first value if they are set,
# or any that means the same.
MODEL_SETTINGS = {
    "activation_type": ("swiglu",), "block_type": ("sequential",),
    "rope": (True,), "alibi": (False,), "norm_after": (False,),
    "scale_logits": (False,), "clip_qkv": (None,), "include_bias": (False,),
    "embedding_layer_norm": (False,), "multi_query_attention": (False, None),
    "layer_norm_with_affine": (True,), "block_group_size": (1,),
    "moe_interleave": (False,), "attention_dropout": (0,),
    "residual_dropout": (0,), "embedding_dropout": (0,),
}
# Constructor arguments that their model never passes on to its V1 layers.
V1_TUCKER_RANK, V1_NUM_CORES, V1_EXPANSION = 2, 2, 4


def _spans(settings: Settings) -> str:
  """`mem_insert_way`, 0-based, as our spans, 1-based; "" for no memory."""
  way = _required(settings, "mem_insert_way")
  if way == "no_mem":
    return ""
  if way == "full":
    return way
  parts = [span.split(":") for span in way.split("/")]
  require(
      all(len(p) == 2 and all(x.isdecimal() for x in p) for p in parts),
      "mem_insert_way", way,
      "must be full, no_mem or 'i:j' parts joined by '/'",
  )
  spans = "/".join(f"{int(i) + 1}:{int(j) + 1}" for i, j in parts)
  try:
    parse_spans(spans, _required(settings, "n_layers"))
  except ConfigError as error:
    raise ConfigError(f"mem_insert_way = {way!r}: from 1, {error}") from error
  return spans


def _memory(settings: Settings, spans: str, sizes: dict[str, int]):
  """Their mem_* fields as settings of a layer, and the MemoryConfig."""
  kind = _required(settings, "mem_type")
  require(kind in KINDS and kind != "meta_memory", "mem_type", kind,
          "must be ultramem_v1, ultramem_v2 or memory_plus")
  renamed = {
      name: _required(settings, f"mem_{name}")
      for name in ("knum", "kdim", "vdim", "knn")
  }
  layers = settings["n_layers"] if spans == "full" else spans.count("/") + 1
  c = KINDS[kind].config({
      **settings, **renamed, **sizes, "mem_layer_num": layers,
      "head": settings.get("mem_head", 1),
      "pre_vdim": settings.get("mem_pre_vdim", 0),
      "share_ratio": settings.get("mem_share_ratio", 1.0),
  })
  return dataclasses.replace(c, spans=spans)


def _model_config(settings: Settings, sizes: dict[str, int]) -> ModelConfig:
  """Ours, from theirs and the sizes of the memories, see `_memory_sizes`."""
  for name, allowed in MODEL_SETTINGS.items():
    _only(settings, name, allowed, f"must be {allowed[0]}: nothing else is "
          "supported")
  width, heads = (_required(settings, n) for n in ("d_model", "n_heads"))
  _only(settings, "n_kv_heads", (None, heads), f"must be n_heads = {heads}")
  norm, eps, bias = _norm_settings(settings)
  spans = _spans(settings)
  hidden = settings.get("mlp_hidden_size")
  if hidden is None:
    hidden = settings.get("mlp_ratio", 4) * width
  return ModelConfig(
      vocab_size=settings.get("embedding_size")
      or _required(settings, "vocab_size"),
      embed_dim=width, num_layers=_required(settings, "n_layers"),
      num_heads=heads, mlp_dim=hidden // 2, activation="swiglu", norm=norm,
      norm_eps=eps, norm_bias=bias,
      qk_norm=settings.get("attention_layer_norm", False),
      tie_embeddings=settings.get("weight_tying", True),
      rope_theta=float(settings.get("rope_theta", 10_000)), dropout_rate=0.0,
      dtype="float32", attention="xla", remat="none", moe=MoeConfig(),
      memory=_memory(settings, spans, sizes) if spans else MemoryConfig(
          num_keys=1, key_dim=1, value_dim=1, top_m=1, num_cores=1,
          kind="none",
      ),
  )


def _nested(entries: dict[str, Entry], prefix: str, module: str):
  """Entries of a layer as those of a model that holds it as module."""
  def nest(path):
    return (path[0], module, *path[1:])

  return {
      f"{prefix}{name}": entry._replace(paths=tuple(map(nest, entry.paths)))
      for name, entry in entries.items()
  }


def _block_entries(c: ModelConfig) -> dict[str, Entry]:
  """Of one block; paths as if the block were the model."""
  width, hidden = c.embed_dim, c.mlp_dim
  heads = (c.num_heads, c.head_dim)
  kernels = [
      ("params", "attention", name, "kernel")
      for name in ("query", "key", "value", "out")
  ]
  ups = [("params", "mlp", name, "kernel") for name in ("up", "gate")]
  entries = {
      "att_proj.weight": _entry(
          *kernels[:3], split=(3, *heads, width), axes=(0, 3, 1, 2),
          shape=(3 * width, width),
      ),
      "attn_out.weight": _entry(
          kernels[3], split=(width, *heads), axes=(1, 2, 0),
          shape=(width, width),
      ),
      "ff_proj.weight": _entry(
          *ups, split=(2, hidden, width), axes=(0, 2, 1),
          shape=(2 * hidden, width),
      ),
      "ff_out.weight": _linear(
          ("params", "mlp", "down", "kernel"), width, hidden
      ),
  }
  norms = {
      "attn_norm": (("attention_norm",), width),
      "ff_norm": (("mlp_norm",), width),
  }
  if c.qk_norm:
    norms["q_norm"] = (("attention", "query_norm"), c.head_dim)
    norms["k_norm"] = (("attention", "key_norm"), c.head_dim)
  for name, (path, size) in norms.items():
    entries |= _norm_entries(name, ("params", *path), size, c.norm_bias)
  return entries


def _model_entries(c: ModelConfig) -> dict[str, Entry]:
  """Of the whole model."""
  width, vocabulary = c.embed_dim, c.vocab_size
  entries = {
      "transformer.wte.weight": _entry(
          ("params", "embed", "embedding"), split=(vocabulary, width)
      ),
      **_norm_entries("transformer.ln_f", ("params", "final_norm"), width,
                      c.norm_bias),
  }
  if not c.tie_embeddings:
    entries["transformer.ff_out.weight"] = _linear(
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
      entries |= _nested(
          memory, f"transformer.mem_blocks.{span.index}.",
          f"memory_{span.index}",
      )
    if c.memory.shares_table:
      entries |= _table_entries(
          c.memory, "transformer.full_memory_layer.", "memory_tables"
      )
  return entries


def _memory_sizes(settings: Settings, shapes: Mapping[str, tuple[int, ...]]):
  """Rank, cores and projections of a model's memories, from its tensors.

  Their model config does not decide them: V1 layers always have the
  constructor's defaults. Those stand in for tensors that are absent.
  """
  prefix = "transformer.mem_blocks.0."
  cores = sum(name.startswith(f"{prefix}tucker_core.") for name in shapes)
  keys = shapes.get(f"{prefix}keys", ())
  projection = shapes.get(f"{prefix}values_proj.weight", ())
  projections = (
      V1_EXPANSION if settings.get("mem_type") == "ultramem_v1"
      else settings.get("mem_value_expand_time", 1)
  )
  if len(projection) == 2:
    projections = projection[1] // _required(settings, "mem_vdim")
  return {
      "tucker_rank": keys[-1] if len(keys) == 5 else V1_TUCKER_RANK,
      "tucker_multihead": cores or V1_NUM_CORES,
      "value_expand_time": projections,
  }


def from_official_model(settings: Settings, state_dict: Any):
  """The authors' whole model as a Transformer.

  Args:
    settings: fields of their model config.
    state_dict: as in `from_official`.
  Returns:
    (model, variables): model.apply(variables, tokens_BT) is their logits.
  Raises:
    ConfigError: as `from_official`.
  """
  arrays = load(state_dict)
  shapes = {name: np.shape(array) for name, array in arrays.items()}
  c = _model_config(settings, _memory_sizes(settings, shapes))
  return Transformer(c), _read(_model_entries(c), arrays)


def to_official_model(settings: Settings, variables: Any):
  """Their tensors by name: the inverse of `from_official_model`.

  Args, Raises: as `to_official`.
  """
  memory = nn.unbox(variables)["params"].get("memory_0")
  shapes = {}
  if memory is not None:
    # The shapes that `_memory_sizes` reads, in their layout.
    prefix = "transformer.mem_blocks.0."
    sides, heads, rank, keys, width = memory["keys"].shape
    shapes[f"{prefix}keys"] = (heads, sides, keys, width, rank)
    projections, width, embed_dim = memory["value_projection"].shape
    shapes[f"{prefix}values_proj.weight"] = (embed_dim, projections * width)
    for core in range(len(memory.get("core", ()))):
      shapes[f"{prefix}tucker_core.{core}"] = ()
  c = _model_config(settings, _memory_sizes(settings, shapes))
  return _write(_model_entries(c), variables)


# Arrays in and out.


def _refuse(faults: list[str]) -> None:
  if faults:
    raise ConfigError(f"tensors do not fit: {'; '.join(faults)}")


def _read(entries: dict[str, Entry], arrays: Mapping[str, Any]):
  """Our variables from their tensors, after one check of all of them."""
  faults = [f"{name} is missing" for name in entries if name not in arrays]
  for name, array in arrays.items():
    if name not in entries:
      faults.append(f"{name} is unknown")
    elif np.shape(array) != entries[name].shape:
      faults.append(f"{name} has shape {list(np.shape(array))}, must be "
                    f"{list(entries[name].shape)}")
  _refuse(faults)
  flat, parts = {}, {}
  for name, entry in entries.items():
    for path, array in entry.read(np.asarray(arrays[name])).items():
      kind = np.int32 if np.issubdtype(array.dtype, np.integer) else np.float32
      if isinstance(path[-1], int):
        parts.setdefault(path[:-1], {})[path[-1]] = array.astype(kind)
      else:
        flat[path] = jnp.asarray(array.astype(kind))
  for path, elements in parts.items():
    flat[path] = jnp.stack([elements[i] for i in range(len(elements))])
  return traverse_util.unflatten_dict(flat)


def _write(entries: dict[str, Entry], variables: Any) -> dict[str, np.ndarray]:
  """Their tensors from our variables, after one check of all of them."""
  variables = {
      name: nn.unbox(variables[name])
      for name in ("params", "buffers") if name in variables
  }
  flat = {}
  for path, array in traverse_util.flatten_dict(variables).items():
    if path[-1] == "core":
      flat |= {(*path, i): part for i, part in enumerate(np.asarray(array))}
    else:
      flat[path] = np.asarray(array)
  entries = {
      name: entry for name, entry in entries.items()
      if entry.paths[0][0] in variables
  }
  faults = []
  for entry in entries.values():
    moved = tuple(entry.split[axis] for axis in entry.axes)
    shape = moved if len(entry.paths) == 1 else moved[1:]
    for path in entry.paths:
      name = "/".join(map(str, path))
      if path not in flat:
        faults.append(f"{name} is missing")
      elif flat[path].shape != shape:
        faults.append(
            f"{name} has shape {list(flat[path].shape)}, must be {list(shape)}"
        )
  known = {path for entry in entries.values() for path in entry.paths}
  faults += [
      f"{'/'.join(map(str, path))} is unknown"
      for path in flat if path not in known
  ]
  _refuse(faults)
  named = {name: entry.write(flat) for name, entry in entries.items()}
  # Their indices are int64.
  return {
      name: array.astype(np.int64)
      if np.issubdtype(array.dtype, np.integer) else array
      for name, array in named.items()
  }


# dtypes of the safetensors format.
SAFETENSORS_DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16,
    "BF16": jnp.bfloat16, "I64": np.int64, "I32": np.int32,
    "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
}


def load(state_dict: Any) -> Mapping[str, np.ndarray]:
  """Arrays by name: as they are, or from a .safetensors or .pt file.

  Raises:
    ConfigError: another suffix, a broken file, or a .pt file without torch.
  """
  if not isinstance(state_dict, str | os.PathLike):
    return state_dict
  path = pathlib.Path(state_dict)
  require(path.suffix in (".safetensors", ".pt"), "state_dict", str(path),
          "must end in .safetensors or .pt")
  require(path.is_file(), "state_dict", str(path), "is not a file")
  if path.suffix == ".safetensors":
    return _load_safetensors(path)
  try:
    import torch  # optional, and slow to import
  except ImportError as error:
    raise ConfigError(
        f"state_dict = {str(path)!r}: reading .pt needs torch; install it, or "
        "save the tensors as .safetensors"
    ) from error
  tensors = torch.load(path, map_location="cpu", weights_only=True)
  return {
      name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
      for name, tensor in tensors.items()
  }


def _load_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The format: length of the header (uint64), header (JSON), raw bytes."""
  data = np.memmap(path, np.uint8, mode="r")
  try:
    length = int(data[:8].view("<u8")[0])
    header = json.loads(bytes(data[8 : 8 + length]))
    header.pop("__metadata__", None)
    arrays = {}
    for name, tensor in header.items():
      start, end = tensor["data_offsets"]
      raw = data[8 + length + start : 8 + length + end]
      dtype = np.dtype(SAFETENSORS_DTYPES[tensor["dtype"]])
      arrays[name] = (
          np.frombuffer(raw.tobytes(), dtype).reshape(tensor["shape"])
      )
  except (ValueError, KeyError, IndexError) as error:
    raise ConfigError(
        f"state_dict = {str(path)!r}: is not a safetensors file that we can "
        f"read ({error!r})"
    ) from error
  return arrays
