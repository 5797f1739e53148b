"""Meta's Memory+ layer, `HashingMemory`.

Source: facebookresearch/memory, lingua/product_key/memory.py.
"""

import math

from ultramem_jax.interop.official.settings import (
  Settings,
  require_value,
  required,
)
from ultramem_jax.interop.tensors import Entry, linear, make_entry
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.imported import ImportedWeights
from ultramem_jax.settings.memory import MemoryConfig


def meta_config(settings: Settings) -> MemoryConfig:
  """Returns the config of the layer."""
  key_dim = settings.get("mem_k_dim", 512)
  require(key_dim % 2 == 0, "mem_k_dim", key_dim, "must be even")
  require_value(
    settings,
    "mem_query_batchnorm",
    (False,),
    "must be false: batch normalization is not supported",
  )
  require_value(
    settings,
    "peer_variant",
    (False,),
    "must be false: PEER weights are not supported",
  )
  for name in ("mem_input_dropout", "mem_query_dropout", "mem_value_dropout"):
    require_value(settings, name, (0,), "must be 0: dropout is not supported")
  gated = settings.get("swilu_projection", True)
  return MemoryConfig(
    kind="memory_plus",
    num_keys=settings.get("mem_n_keys", 1024),
    key_dim=key_dim // 2,
    value_dim=_value_dim(settings),
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


def meta_entries(c: MemoryConfig, embed_dim: int) -> dict[str, Entry]:
  """Returns the tensors of the layer, by name."""
  query = (c.num_heads, 2, 1, c.key_dim)
  outputs = math.prod(query)
  entries = {
    "keys": make_entry(
      ("params", "keys"),
      split=(c.num_heads, 2, c.grid_side, c.key_dim, 1),
      axes=(1, 0, 4, 2, 3),
      shape=(c.num_heads * 2 * c.grid_side, c.key_dim),
    ),
    "values.weight": make_entry(
      ("params", "values"), split=(c.num_rows, c.value_dim)
    ),
    "query_proj.query_mlps.0.weight": make_entry(
      ("params", "query"),
      split=(*query, embed_dim),
      axes=(4, 1, 0, 2, 3),
      shape=(outputs, embed_dim),
    ),
  }
  if c.imported.query_bias:
    entries["query_proj.query_mlps.0.bias"] = make_entry(
      ("params", "query_bias"), split=query, axes=(1, 0, 2, 3), shape=(outputs,)
    )
  if c.value_projection:
    entries["value_proj.weight"] = make_entry(
      ("params", "value_projection"),
      split=(embed_dim, 1, c.value_dim),
      axes=(1, 2, 0),
      shape=(embed_dim, c.value_dim),
    )
    entries["value_proj.bias"] = make_entry(
      ("params", "value_projection_bias"), split=(embed_dim,)
    )
  if c.input_gate:
    entries |= _dense_entries(
      "swilu_projection", "gate", c.value_dim, embed_dim
    )
  if c.imported.output_gate:
    entries |= _dense_entries("gating", "output_gate", 1, embed_dim)
  return entries


def _value_dim(settings: Settings) -> int:
  """Returns the width of a value, by default that of the model."""
  inputs, outputs = (required(settings, f"{n}put_dim") for n in ("in", "out"))
  require(
    inputs == outputs, "output_dim", outputs, f"must equal input_dim = {inputs}"
  )
  width = settings.get("mem_v_dim", -1)
  return width if width > 0 else outputs


def _dense_entries(
  tensor: str, array: str, outputs: int, inputs: int
) -> dict[str, Entry]:
  """Returns weight and bias of a torch linear map, our Linear."""
  return {
    f"{tensor}.weight": linear(("params", array, "kernel"), outputs, inputs),
    f"{tensor}.bias": make_entry(("params", array, "bias"), split=(outputs,)),
  }
