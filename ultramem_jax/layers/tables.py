"""Tables of values: one layer's own, or one that several layers share.

Layers read them through `pool_rows` and `dot_rows` here, which also give a
table's gradient as factors (`ops/row_update.py`): where the collection
"factors" is mutable they sow what was read, and where the collection "taps"
holds zeros they add them to what was looked up, so that the gradient of a tap
is that of the lookup's output.
"""

import flax.linen as nn
import jax.numpy as jnp

from ultramem_jax.ops import precision, random
from ultramem_jax.ops.sharded import lookup as sharded_lookup
from ultramem_jax.settings.memory import MemoryConfig


def value_table(
  module: nn.Module,
  config: MemoryConfig,
  num_layers: int,
  name: str = "values",
  width: int | None = None,
):
  """A table of module by its name: a parameter [I, width], default [I, W].

  I counts the rows it is stored with (`storage.row_multiple`).

  float32, or the bits of `storage.table_dtype`; with int8 also NAME_scale [I],
  of each row. An int8 table has no initialization of use: it comes from a
  trained run.

  Paper init gives the output of a layer that reads it, scores of mean square
  1, the variance 1 / (2 L).
  """
  c = config
  std = 0.02
  if c.init == "paper":
    std = (c.expansion / (2 * c.top_m * c.num_heads * num_layers)) ** 0.5
  elif c.kind == "memory_plus":
    std = c.value_dim**-0.5
  dtype = precision.DTYPES[c.storage.table_dtype]
  initializer = nn.with_logical_partitioning(
    lambda key, shape: precision.encode(std * random.normal(key, shape), dtype),
    ("rows", "columns"),
  )
  shape = (c.stored_rows, width or c.value_dim)
  tables = {name: module.param(name, initializer, shape)}
  if c.storage.table_dtype == "int8":
    scale = f"{name}_scale"
    ones = nn.with_logical_partitioning(nn.initializers.ones, ("rows",))
    tables[scale] = module.param(scale, ones, shape[:1])
  return tables


def value_tables(module: nn.Module, config: MemoryConfig, num_layers: int):
  """Every table of a memory, by name: `values`, `pre_values` if it has them."""
  tables = value_table(module, config, num_layers)
  if config.pre_value_dim:
    tables |= value_table(
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


def pool_rows(
  module: nn.Module,
  tables,
  name: str,
  index_BTK,
  score_BTKC,
  num_blocks: int = 1,
):
  """`sharded.lookup.pool_rows` of the table `name` of tables, read by module.

  index_BTK counts the rows that the config has, row + I * block, however many
  more the table is stored with.
  """
  c = module.config
  if num_blocks > 1 and c.stored_rows > c.num_rows:
    index_BTK += (index_BTK // c.num_rows) * (c.stored_rows - c.num_rows)
  scale_BTK = _scales(tables, name, index_BTK)
  if scale_BTK is not None:
    score_BTKC *= scale_BTK[..., None]
  pooled_BTEW = sharded_lookup.pool_rows(
    tables[name],
    index_BTK,
    score_BTKC,
    num_blocks,
    c.storage.kernel,
    module.layout,
  )
  return _tap(
    module, name, pooled_BTEW, index_BTK=index_BTK, weight_BTKC=score_BTKC
  )


def dot_rows(module: nn.Module, tables, name: str, index_BTK, x_BTW):
  """`sharded.lookup.dot_rows` of the table `name` of tables, read by module."""
  out_BTK = sharded_lookup.dot_rows(
    tables[name], index_BTK, x_BTW, module.config.storage.kernel, module.layout
  )
  scale_BTK = _scales(tables, name, index_BTK)
  if scale_BTK is not None:
    out_BTK *= scale_BTK
  return _tap(
    module,
    name,
    out_BTK,
    index_BTK=index_BTK,
    vector_BTEW=x_BTW[:, :, None].astype(jnp.float32),
  )


def _scales(tables, name, index_BTK):
  """The scales of int8 rows at indices of any block; None for other tables."""
  scale_I = tables.get(f"{name}_scale")
  return None if scale_I is None else scale_I[index_BTK % scale_I.shape[0]]


def _tap(module, name, output, **read):
  """output plus its tap, and what was read sown; neither at initialization."""
  if module.is_initializing():
    return output
  module.sow("factors", name, read)
  if module.has_variable("taps", name) or module.is_mutable_collection("taps"):
    output += module.variable("taps", name, jnp.zeros_like, output).value
  return output
