"""Tables of values: one layer's own, or one that several layers share."""

import flax.linen as nn

from ultramem_jax.config import MemoryConfig
from ultramem_jax.ops import random


def value_table(
    module: nn.Module, config: MemoryConfig, num_layers: int,
    name: str = "values", width: int | None = None,
):
  """The parameter `name` of module: a table [I, width], [I, W] by default.

  Paper init gives the output of a layer that reads it, scores of mean square
  1, the variance 1 / (2 L).
  """
  c = config
  std = 0.02
  if c.init == "paper":
    std = (c.expansion / (2 * c.top_m * c.num_heads * num_layers)) ** 0.5
  elif c.kind == "memory_plus":
    std = c.value_dim**-0.5
  initializer = nn.with_logical_partitioning(
      lambda key, shape: std * random.normal(key, shape), ("rows", "columns")
  )
  return module.param(name, initializer, (c.num_rows, width or c.value_dim))


def value_tables(module: nn.Module, config: MemoryConfig, num_layers: int):
  """Every table of a memory, by name: `values`, `pre_values` if it has them."""
  tables = {"values": value_table(module, config, num_layers)}
  if config.pre_value_dim:
    tables["pre_values"] = value_table(
        module, config, num_layers, "pre_values", config.pre_value_dim
    )
  return tables


class SharedTables(nn.Module):
  """The tables of all memories of a model that share them."""

  config: MemoryConfig
  num_layers: int = 1

  @nn.compact
  def __call__(self):
    return value_tables(self, self.config, self.num_layers)
