"""UltraMem in JAX: the memory layer, its transformer, and their training."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  from ultramem_jax import interop
  from ultramem_jax.layers.buffers import refresh_buffers
  from ultramem_jax.layers.memory_plus import MemoryPlus
  from ultramem_jax.layers.peer import Peer
  from ultramem_jax.layers.tables import SharedTables
  from ultramem_jax.layers.ultramem import UltraMem
  from ultramem_jax.layers.ultramem_v2 import UltraMemV2
  from ultramem_jax.model import Transformer
  from ultramem_jax.ops.row_update import AdamW
  from ultramem_jax.ops.sharded.layout import Layout
  from ultramem_jax.settings.config import Config
  from ultramem_jax.settings.errors import ConfigError
  from ultramem_jax.settings.memory import MemoryConfig
  from ultramem_jax.settings.model import ModelConfig, MoeConfig
  from ultramem_jax.train.tables import (
    TABLE_COLLECTIONS,
    global_norm,
    join_tables,
    sparse_value_and_grad,
    take_tables,
    update_tables,
  )

__all__ = [
  "TABLE_COLLECTIONS",
  "AdamW",
  "Config",
  "ConfigError",
  "Layout",
  "MemoryConfig",
  "MemoryPlus",
  "ModelConfig",
  "MoeConfig",
  "Peer",
  "SharedTables",
  "Transformer",
  "UltraMem",
  "UltraMemV2",
  "global_norm",
  "interop",
  "join_tables",
  "refresh_buffers",
  "sparse_value_and_grad",
  "take_tables",
  "update_tables",
]

# The modules of these names. They are imported when a name is first used, so
# that `ultramem --help` and the settings need no JAX.
_MODULES = {
  "TABLE_COLLECTIONS": "train.tables",
  "AdamW": "ops.row_update",
  "Config": "settings.config",
  "ConfigError": "settings.errors",
  "Layout": "ops.sharded.layout",
  "MemoryConfig": "settings.memory",
  "MemoryPlus": "layers.memory_plus",
  "ModelConfig": "settings.model",
  "MoeConfig": "settings.model",
  "Peer": "layers.peer",
  "SharedTables": "layers.tables",
  "Transformer": "model",
  "UltraMem": "layers.ultramem",
  "UltraMemV2": "layers.ultramem_v2",
  "global_norm": "train.tables",
  "join_tables": "train.tables",
  "refresh_buffers": "layers.buffers",
  "sparse_value_and_grad": "train.tables",
  "take_tables": "train.tables",
  "update_tables": "train.tables",
}


def __getattr__(name: str) -> Any:
  if name == "interop":
    return importlib.import_module(f"{__name__}.interop")
  if name not in _MODULES:
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
  module = importlib.import_module(f"{__name__}.{_MODULES[name]}")
  return getattr(module, name)
