"""Imports and exports a single layer of the authors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ultramem_jax.interop.files import load
from ultramem_jax.interop.official import meta, ultramem
from ultramem_jax.interop.official.arrays import read, write
from ultramem_jax.interop.official.settings import Settings, required
from ultramem_jax.interop.tensors import Entry
from ultramem_jax.layers.memory_plus import MemoryPlus
from ultramem_jax.layers.ultramem import UltraMem
from ultramem_jax.layers.ultramem_v2 import UltraMemV2
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.memory import MemoryConfig


class Kind(NamedTuple):
  """A layer of the authors.

  layer: our class of it.
  config: turns the authors' settings into ours.
  entries: (config, width of the model) -> the layer's tensors by name.
  width: the setting that holds the width of the model.
  """

  layer: type[UltraMem]
  config: Callable[[Settings], MemoryConfig]
  entries: Callable[[MemoryConfig, int], dict[str, Entry]]
  width: str = "hidden_size"


KINDS = {
  "ultramem_v1": Kind(UltraMem, ultramem.v1_config, ultramem.v1_entries),
  "ultramem_v2": Kind(UltraMemV2, ultramem.v2_config, ultramem.v2_entries),
  "memory_plus": Kind(
    MemoryPlus, ultramem.memory_plus_config, ultramem.memory_plus_entries
  ),
  "meta_memory": Kind(
    MemoryPlus, meta.meta_config, meta.meta_entries, "input_dim"
  ),
}


def from_official(
  kind: str, state_dict: Any, /, **settings: Any
) -> tuple[UltraMem, Any]:
  """Returns one of our layers that computes what the authors' layer does.

  Args:
    kind: "ultramem_v1", "ultramem_v2", "memory_plus" (classes of the UltraMem
      authors) or "meta_memory" (Meta's `HashingMemory`).
    state_dict: parameters and buffers as numpy arrays by name, or the path of
      a .safetensors or .pt file. The names of a table that layers share begin
      with "full_memory_layer.".
    **settings: the constructor's arguments and the fields of its config. Those
      that do not change what the layer computes are ignored.
  Returns:
    (layer, variables), so that layer.apply(variables, x_BTD) is the output.
  Raises:
    ConfigError: we cannot express a setting, which is named; or tensors are
      missing, unknown or wrongly shaped, all listed in one message.
  """
  layer, entries = _layer(kind, settings)
  return layer, read(entries, load(state_dict))


def to_official(
  kind: str, variables: Any, /, **settings: Any
) -> dict[str, np.ndarray]:
  """Returns the authors' tensors by name: the inverse of `from_official`.

  It is linear in the parameters, so that it renames gradients as well. A
  collection that variables lacks, such as the buffers of a gradient, is left
  out.

  Args:
    kind: as in `from_official`.
    variables: {"params": ..., "buffers": ...} of the layer.
    **settings: as in `from_official`.
  Returns:
    {name: numpy array}.
  Raises:
    ConfigError: we cannot express a setting, or arrays are missing, unknown or
      wrongly shaped.
  """
  return write(_layer(kind, settings)[1], variables)


def _layer(kind: str, settings: Settings) -> tuple[UltraMem, dict[str, Entry]]:
  """Returns our layer, and the tensors of the authors' layer."""
  require(kind in KINDS, "kind", kind, f"must be one of {', '.join(KINDS)}")
  layer_class, make_config, make_entries, width = KINDS[kind]
  embed_dim = required(settings, width)
  config = make_config(settings)
  layer = layer_class(
    config, embed_dim, layer_index=settings.get("layer_id", 0)
  )
  entries = make_entries(config, embed_dim)
  if kind in ("ultramem_v2", "memory_plus"):
    entries |= ultramem.table_entries(config, "full_memory_layer.")
  return layer, entries
