"""UltraMem in JAX: the memory layer, its transformer, and their training."""

from ultramem_jax.layers.memory_plus import MemoryPlus
from ultramem_jax.layers.peer import Peer
from ultramem_jax.layers.ultramem import UltraMem, refresh_buffers
from ultramem_jax.layers.ultramem_v2 import UltraMemV2
from ultramem_jax.model import Transformer
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.memory import MemoryConfig
from ultramem_jax.settings.model import ModelConfig, MoeConfig

__all__ = [
  "Config",
  "ConfigError",
  "MemoryConfig",
  "MemoryPlus",
  "ModelConfig",
  "MoeConfig",
  "Peer",
  "Transformer",
  "UltraMem",
  "UltraMemV2",
  "refresh_buffers",
]
