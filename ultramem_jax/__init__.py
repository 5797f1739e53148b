"""UltraMem in JAX: the memory layer, its transformer, and their training."""

from ultramem_jax.config import (
    Config,
    ConfigError,
    MemoryConfig,
    ModelConfig,
    MoeConfig,
)
from ultramem_jax.layers.ultramem import UltraMem, refresh_buffers
from ultramem_jax.model import Transformer

__all__ = [
    "Config",
    "ConfigError",
    "MemoryConfig",
    "ModelConfig",
    "MoeConfig",
    "Transformer",
    "UltraMem",
    "refresh_buffers",
]
