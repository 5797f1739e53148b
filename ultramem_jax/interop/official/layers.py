"""The authors' layers: their settings, their tensors, in and out."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from ultramem_jax.interop.files import load
from ultramem_jax.interop.official.settings import (
  Settings,
  norm_settings,
  only,
  required,
)
from ultramem_jax.interop.tensors import Entry, Path, entry, linear, read, write
from ultramem_jax.layers.memory_plus import MemoryPlus
from ultramem_jax.layers.ultramem import UltraMem
from ultramem_jax.layers.ultramem_v2 import UltraMemV2
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.imported import ImportedWeights
from ultramem_jax.settings.memory import MemoryConfig

# Heads that read one query pair, a constant of the authors' code.
HEADS_PER_QUERY = 2


def _query_key_norm(settings: Settings) -> dict[str, Any]:
  name = "attention_layer_norm_with_affine"
  if settings.get(name, True) is None:
    name = "layer_norm_with_affine"
  only(settings, name, (True,), "must be true: norms have a weight")
  kind, eps, bias = norm_settings(settings)
  return {
    "query_key_norm": kind,
    "norm_eps": eps,
    "imported": ImportedWeights(norm_bias=bias),
  }


# The three kinds of layer: their settings as ours, and their tensors.


def _ultramem_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  """Tensors that V1, V2 and Memory+ name alike."""
  width, heads, projections = c.value_dim, c.num_heads, c.projections
  query = (c.num_queries, 2, 1, c.key_dim, embed_dim)
  keys = (heads, 2, c.grid_side, c.key_dim, c.rank)
  entries = {
    "query_proj.weight": entry(
      ("params", "query"),
      split=query,
      axes=(4, 1, 0, 2, 3),
      shape=(math.prod(query[:-1]), embed_dim),
    ),
    "keys": entry(
      ("params", "keys"),
      split=keys,
      axes=(1, 0, 4, 2, 3),
      shape=keys if c.score == "tucker" else keys[:-1],
    ),
    "values_proj.weight": entry(
      ("params", "value_projection"),
      split=(embed_dim, projections, width),
      axes=(1, 2, 0),
      shape=(embed_dim, projections * width),
    ),
  }
  for ours, theirs in (("query_norm", "query_norm"), ("key_norm", "keys_norm")):
    entries |= norm_entries(
      theirs, ("params", ours), c.key_dim, c.imported.norm_bias
    )
  return entries


def norm_entries(name: str, path: Path, size: int, bias: bool):
  """Of a norm: {name.weight: ..., name.bias: ...}."""
  names = {"weight": "scale", "bias": "bias"} if bias else {"weight": "scale"}
  return {
    f"{name}.{theirs}": entry((*path, ours), split=(size,))
    for theirs, ours in names.items()
  }


def _tucker_entries(c: MemoryConfig) -> dict[str, Entry]:
  """Cores, filter vectors and shuffle of V1 and V2."""
  heads, rank = c.num_heads, c.rank
  entries = {
    f"tucker_core.{core}": entry(
      ("params", "core", core), split=(heads, rank, rank)
    )
    for core in range(c.num_cores)
  }
  for ours, theirs in (("u", "tucker_core_u"), ("t", "tucker_core_v")):
    entries[theirs] = entry(
      ("buffers", ours), split=(heads, rank), shape=(1, heads, 1, rank)
    )
  entries["shuffle_index"] = entry(
    ("buffers", "permutation"), split=(c.grid_side**2,)
  )
  return entries


def table_entries(c: MemoryConfig, prefix: str, *path: str):
  """Of the table and the pre-values, under prefix and path."""
  widths = {"values": c.value_dim}
  if c.pre_value_dim:
    widths["pre_values"] = c.pre_value_dim
  return {
    f"{prefix}{name}_for_look_up": entry(
      ("params", *path, name), split=(c.num_rows, width)
    )
    for name, width in widths.items()
  }


def _sizes(settings: Settings) -> dict[str, Any]:
  """Settings that V1, V2 and Memory+ name alike."""
  return {
    "num_keys": required(settings, "knum"),
    "key_dim": required(settings, "kdim"),
    "value_dim": required(settings, "vdim"),
    "top_m": required(settings, "knn"),
    "num_heads": settings.get("head", 1),
    **_query_key_norm(settings),
  }


def _tucker_config(settings: Settings, pairs: int, **fields) -> MemoryConfig:
  """Of V1 or V2, with so many query pairs, each read by two heads."""
  sizes = _sizes(settings)
  heads = sizes["num_heads"]
  spare = pairs - math.ceil(heads / HEADS_PER_QUERY)
  require(
    1 <= heads <= HEADS_PER_QUERY * pairs,
    "head",
    heads,
    f"must be at most {HEADS_PER_QUERY * pairs}: two heads read a pair "
    f"of queries, of which there are {pairs}",
  )
  sizes["imported"] = dataclasses.replace(
    sizes["imported"], spare_queries=spare
  )
  return MemoryConfig(
    **sizes,
    **fields,
    heads_per_query=min(HEADS_PER_QUERY, heads),
    query_per_rank=False,
    tucker_rank=settings.get("tucker_rank", 2),
    num_cores=settings.get("tucker_multihead", 2),
    shuffle="permutation",
    query_conv=0,
    init="official",
  )


def _v1_config(settings: Settings) -> MemoryConfig:
  expansion = settings.get("value_expand_time", 4)
  require(
    math.isqrt(expansion) ** 2 == expansion,
    "value_expand_time",
    expansion,
    "must be a perfect square",
  )
  return _tucker_config(settings, pairs=1, expansion=expansion)


def _v2_config(settings: Settings) -> MemoryConfig:
  expansion = settings.get("mem_key_expand_time", 1) ** 2
  projections = settings.get("value_expand_time", 4)
  require(
    projections in (1, expansion),
    "value_expand_time",
    projections,
    f"must be 1 or mem_key_expand_time^2 = {expansion}",
  )
  only(
    settings,
    "mem_key_balance_reg_coef",
    (0, None),
    "must be 0: the balance loss of keys, which is part of their "
    "gradients, is not supported",
  )
  only(
    settings,
    "mem_output_dropout_rate",
    (0, None),
    "must be 0: dropout inside the layer is not supported",
  )
  rank = settings.get("tucker_rank", 2)
  return _tucker_config(
    settings,
    kind="ultramem_v2",
    expansion=expansion,
    shared_projection=projections == 1,
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
    **_ultramem_entries(c, embed_dim),
    **_tucker_entries(c),
    **table_entries(c, ""),
  }


def _v2_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  entries = _ultramem_entries(c, embed_dim) | _tucker_entries(c)
  if c.pre_value_dim:
    entries["pre_values_proj.weight"] = linear(
      ("params", "pre_projection"), c.pre_value_dim, embed_dim
    )
  return entries


def _memory_plus_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  return {
    **_ultramem_entries(c, embed_dim),
    "swilu_projection.weight": linear(
      ("params", "gate", "kernel"), c.value_dim, embed_dim
    ),
  }


# Meta's layer (facebookresearch/memory, lingua/product_key/memory.py).


def _meta_config(settings: Settings) -> MemoryConfig:
  width = _meta_width(settings)
  sides = settings.get("mem_k_dim", 512)
  require(sides % 2 == 0, "mem_k_dim", sides, "must be even")
  only(
    settings,
    "mem_query_batchnorm",
    (False,),
    "must be false: batch normalization is not supported",
  )
  only(
    settings,
    "peer_variant",
    (False,),
    "must be false: PEER weights are not supported",
  )
  for name in ("mem_input_dropout", "mem_query_dropout", "mem_value_dropout"):
    only(settings, name, (0,), "must be 0: dropout is not supported")
  gated = settings.get("swilu_projection", True)
  return MemoryConfig(
    kind="memory_plus",
    num_keys=settings.get("mem_n_keys", 1024),
    key_dim=sides // 2,
    value_dim=width,
    top_m=settings.get("mem_knn", 32),
    num_heads=settings.get("mem_heads", 4),
    query_key_norm="none",
    input_gate=gated,
    value_projection=gated or settings.get("mem_v_dim", -1) > 0,
    imported=ImportedWeights(
      query_bias=settings.get("mem_query_bias", True),
      projection_bias=True,
      output_gate=settings.get("mem_gated", False),
    ),
  )


def _meta_width(settings: Settings) -> int:
  """Width of a value."""
  inputs, outputs = (required(settings, f"{n}put_dim") for n in ("in", "out"))
  require(
    inputs == outputs, "output_dim", outputs, f"must equal input_dim = {inputs}"
  )
  width = settings.get("mem_v_dim", -1)
  return width if width > 0 else outputs


def _meta_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  heads, sides, width = c.num_heads, c.grid_side, c.value_dim
  query = (heads, 2, 1, c.key_dim)
  outputs = math.prod(query)
  entries = {
    "keys": entry(
      ("params", "keys"),
      split=(heads, 2, sides, c.key_dim, 1),
      axes=(1, 0, 4, 2, 3),
      shape=(heads * 2 * sides, c.key_dim),
    ),
    "values.weight": entry(("params", "values"), split=(c.num_rows, width)),
    "query_proj.query_mlps.0.weight": entry(
      ("params", "query"),
      split=(*query, embed_dim),
      axes=(4, 1, 0, 2, 3),
      shape=(outputs, embed_dim),
    ),
  }
  if c.imported.query_bias:
    entries["query_proj.query_mlps.0.bias"] = entry(
      ("params", "query_bias"), split=query, axes=(1, 0, 2, 3), shape=(outputs,)
    )
  if c.value_projection:
    entries["value_proj.weight"] = entry(
      ("params", "value_projection"),
      split=(embed_dim, 1, width),
      axes=(1, 2, 0),
      shape=(embed_dim, width),
    )
    entries["value_proj.bias"] = entry(
      ("params", "value_projection_bias"), split=(embed_dim,)
    )
  if c.input_gate:
    entries |= biased("swilu_projection", "gate", width, embed_dim)
  if c.imported.output_gate:
    entries |= biased("gating", "output_gate", 1, embed_dim)
  return entries


def biased(theirs: str, ours: str, outputs: int, inputs: int):
  """A torch linear map with a bias, and our nn.Dense."""
  return {
    f"{theirs}.weight": linear(("params", ours, "kernel"), outputs, inputs),
    f"{theirs}.bias": entry(("params", ours, "bias"), split=(outputs,)),
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
  embed_dim = required(settings, width)
  c = config(settings)
  layer = layer_class(c, embed_dim, layer_index=settings.get("layer_id", 0))
  tensors = entries(c, embed_dim)
  if kind in ("ultramem_v2", "memory_plus"):
    tensors |= table_entries(c, "full_memory_layer.")
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
  return layer, read(entries, load(state_dict))


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
  return write(_layer(kind, settings)[1], variables)
