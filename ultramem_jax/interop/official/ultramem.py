"""The layers of the UltraMem authors: UltraMem, UltraMemV2 and Memory+.

For each there is a function that turns the authors' settings into ours, and one
that lists the layer's tensors.
"""

import math
from typing import Any

from ultramem_jax.interop.official.settings import (
  Settings,
  norm_settings,
  require_value,
  required,
)
from ultramem_jax.interop.tensors import Entry, Path, linear, make_entry
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.imported import ImportedWeights
from ultramem_jax.settings.memory import MemoryConfig

# Heads that read one pair of queries, a constant of the authors' code.
HEADS_PER_QUERY = 2


def v1_config(settings: Settings) -> MemoryConfig:
  """Returns the config of an UltraMem layer."""
  expansion = settings.get("value_expand_time", 4)
  require(
    math.isqrt(expansion) ** 2 == expansion,
    "value_expand_time",
    expansion,
    "must be a perfect square",
  )
  return _tucker_config(settings, num_pairs=1, expansion=expansion)


def v2_config(settings: Settings) -> MemoryConfig:
  """Returns the config of an UltraMemV2 layer."""
  expansion = settings.get("mem_key_expand_time", 1) ** 2
  projections = settings.get("value_expand_time", 4)
  require(
    projections in (1, expansion),
    "value_expand_time",
    projections,
    f"must be 1 or mem_key_expand_time^2 = {expansion}",
  )
  require_value(
    settings,
    "mem_key_balance_reg_coef",
    (0, None),
    "must be 0: the balance loss of keys, which is part of their "
    "gradients, is not supported",
  )
  require_value(
    settings,
    "mem_output_dropout_rate",
    (0, None),
    "must be 0: dropout inside the layer is not supported",
  )
  rank = settings.get("tucker_rank", 2)
  return _tucker_config(
    settings,
    num_pairs=rank if settings.get("mem_q_for_each_tucker_rank") else 1,
    kind="ultramem_v2",
    expansion=expansion,
    shared_projection=projections == 1,
    ring_layers=settings.get("mem_layer_num", 1),
    share_ratio=float(settings.get("share_ratio", 1)),
    pre_value_dim=settings.get("pre_vdim", 0),
    pre_activation="gelu" if settings.get("mem_use_glu_act") else "none",
  )


def memory_plus_config(settings: Settings) -> MemoryConfig:
  """Returns the config of a Memory+ layer."""
  return MemoryConfig(
    kind="memory_plus",
    **_common_fields(settings),
    imported=ImportedWeights(norm_bias=_has_norm_bias(settings)),
  )


def v1_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  """Returns the tensors of an UltraMem layer, by name."""
  return {
    **_common_entries(c, embed_dim),
    **_tucker_entries(c),
    **table_entries(c, ""),
  }


def v2_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  """Returns the tensors of an UltraMemV2 layer, without its tables."""
  entries = _common_entries(c, embed_dim) | _tucker_entries(c)
  if c.pre_value_dim:
    entries["pre_values_proj.weight"] = linear(
      ("params", "pre_projection"), c.pre_value_dim, embed_dim
    )
  return entries


def memory_plus_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  """Returns the tensors of a Memory+ layer, without its table."""
  return {
    **_common_entries(c, embed_dim),
    "swilu_projection.weight": linear(
      ("params", "gate", "kernel"), c.value_dim, embed_dim
    ),
  }


def table_entries(c: MemoryConfig, prefix: str, *path: str) -> dict[str, Entry]:
  """Returns the tables of a layer.

  Args:
    c: the layer's config.
    prefix: stands before the names of the tensors.
    *path: stands before the names of the arrays.
  """
  widths = {"values": c.value_dim}
  if c.pre_value_dim:
    widths["pre_values"] = c.pre_value_dim
  return {
    f"{prefix}{name}_for_look_up": make_entry(
      ("params", *path, name), split=(c.num_rows, width)
    )
    for name, width in widths.items()
  }


def norm_entries(
  name: str, path: Path, size: int, bias: bool
) -> dict[str, Entry]:
  """Returns the weight of the norm `name` and, with a bias, the bias."""
  names = {"weight": "scale", "bias": "bias"} if bias else {"weight": "scale"}
  return {
    f"{name}.{tensor}": make_entry((*path, array), split=(size,))
    for tensor, array in names.items()
  }


def _tucker_config(
  settings: Settings, num_pairs: int, **fields: Any
) -> MemoryConfig:
  """Returns the config of a layer with a Tucker core.

  Args:
    settings: the authors' settings.
    num_pairs: pairs of a row and a column query; two heads read each.
    **fields: of the config that only one of the layers sets.
  """
  heads = settings.get("head", 1)
  require(
    1 <= heads <= HEADS_PER_QUERY * num_pairs,
    "head",
    heads,
    f"must be at most {HEADS_PER_QUERY * num_pairs}: two heads read a pair "
    f"of queries, of which there are {num_pairs}",
  )
  return MemoryConfig(
    **_common_fields(settings),
    **fields,
    heads_per_query=min(HEADS_PER_QUERY, heads),
    query_per_rank=False,
    tucker_rank=settings.get("tucker_rank", 2),
    num_cores=settings.get("tucker_multihead", 2),
    shuffle="permutation",
    query_conv=0,
    init="official",
    imported=ImportedWeights(
      norm_bias=_has_norm_bias(settings),
      spare_queries=num_pairs - math.ceil(heads / HEADS_PER_QUERY),
    ),
  )


def _common_fields(settings: Settings) -> dict[str, Any]:
  """Returns the fields whose settings have the same names in all layers."""
  name = "attention_layer_norm_with_affine"
  if settings.get(name, True) is None:
    name = "layer_norm_with_affine"
  require_value(settings, name, (True,), "must be true: norms have a weight")
  norm, epsilon, _ = norm_settings(settings)
  return {
    "num_keys": required(settings, "knum"),
    "key_dim": required(settings, "kdim"),
    "value_dim": required(settings, "vdim"),
    "top_m": required(settings, "knn"),
    "num_heads": settings.get("head", 1),
    "query_key_norm": norm,
    "norm_eps": epsilon,
  }


def _has_norm_bias(settings: Settings) -> bool:
  return norm_settings(settings)[2]


def _common_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  """Returns the tensors that have the same names in all layers."""
  query = (c.num_queries, 2, 1, c.key_dim, embed_dim)
  keys = (c.num_heads, 2, c.grid_side, c.key_dim, c.rank)
  entries = {
    "query_proj.weight": make_entry(
      ("params", "query"),
      split=query,
      axes=(4, 1, 0, 2, 3),
      shape=(math.prod(query[:-1]), embed_dim),
    ),
    "keys": make_entry(
      ("params", "keys"),
      split=keys,
      axes=(1, 0, 4, 2, 3),
      shape=keys if c.score == "tucker" else keys[:-1],
    ),
    "values_proj.weight": make_entry(
      ("params", "value_projection"),
      split=(embed_dim, c.projections, c.value_dim),
      axes=(1, 2, 0),
      shape=(embed_dim, c.projections * c.value_dim),
    ),
  }
  for tensor, array in (
    ("query_norm", "query_norm"),
    ("keys_norm", "key_norm"),
  ):
    entries |= norm_entries(
      tensor, ("params", array), c.key_dim, c.imported.norm_bias
    )
  return entries


def _tucker_entries(c: MemoryConfig) -> dict[str, Entry]:
  """Returns the cores, filter vectors and shuffle of a layer."""
  heads, rank = c.num_heads, c.rank
  entries = {
    f"tucker_core.{core}": make_entry(
      ("params", "core", core), split=(heads, rank, rank)
    )
    for core in range(c.num_cores)
  }
  for tensor, array in (("tucker_core_u", "u"), ("tucker_core_v", "t")):
    entries[tensor] = make_entry(
      ("buffers", array), split=(heads, rank), shape=(1, heads, 1, rank)
    )
  entries["shuffle_index"] = make_entry(
    ("buffers", "permutation"), split=(c.grid_side**2,)
  )
  return entries
