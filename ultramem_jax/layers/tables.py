"""Tables of values: one layer's own, or shared by the layers of a model.

Layers read them through `pool_values` and `dot_values`, which also make a
table's gradient available in factors (`ops/row_update.py`). They sow what was
read in the collection "factors". And they add the zeros of the collection
"taps" to what was looked up, so that the gradient of a tap is the gradient of
the lookup's output.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.layers.parameter import parameter
from ultramem_jax.ops import precision, random
from ultramem_jax.ops.lookup import Kernels
from ultramem_jax.ops.sharded import lookup as sharded_lookup
from ultramem_jax.settings.memory import MemoryConfig

# The name of `SharedTables` in a model.
SHARED = "memory_tables"


def value_table(
  module: nn.Module,
  config: MemoryConfig,
  num_layers: int,
  name: str = "values",
  width: int | None = None,
) -> dict[str, jax.Array]:
  """Makes a table, a parameter of module, and returns it by name.

  float32, or as `storage.table_dtype` says; an int8 table has another parameter
  NAME_scale [I], the scales of its rows. An int8 table is filled by a trained
  run: it has no initialization of its own.

  Paper init gives a layer that reads the table with scores of mean square 1 an
  output of variance 1 / (2 L).

  Args:
    module: the layer, or `SharedTables`.
    config: of the layer.
    num_layers: number L of layers of the residual stream.
    name: of the table.
    width: W; None: config.value_dim.
  Returns:
    {name: [I, W]}, where I counts the rows stored (`storage.row_multiple`); of
    an int8 table the scales too.
  """
  c = config
  std = 0.02
  if c.init == "paper":
    std = (c.projections / (2 * c.top_m * c.num_heads * num_layers)) ** 0.5
  elif c.kind == "memory_plus":
    std = c.value_dim**-0.5
  if c.output == "empty" and name == "values":
    std = 0.0
  dtype = precision.DTYPES[c.storage.table_dtype]

  def initializer(key, shape, _):
    return precision.encode(std * random.normal(key, shape), dtype)

  shape = (c.stored_rows, width or c.value_dim)
  tables = {
    name: parameter(module, name, initializer, ("rows", "columns"), shape)
  }
  if c.storage.table_dtype == "int8":
    scale = f"{name}_scale"
    tables[scale] = parameter(
      module, scale, nn.initializers.ones, ("rows",), shape[:1]
    )
  return tables


def value_tables(
  module: nn.Module, config: MemoryConfig, num_layers: int
) -> dict[str, jax.Array]:
  """Makes every table of a memory: `values`, and `pre_values` if it has them.

  Args and Returns: see `value_table`.
  """
  tables = value_table(module, config, num_layers)
  if config.pre_value_dim:
    tables |= value_table(
      module, config, num_layers, "pre_values", config.pre_value_dim
    )
  return tables


class SharedTables(nn.Module):
  """The tables of all memories of a model that share them.

  Give it the name `SHARED`, by which their sparse update finds them, call it
  once, and give what it returns to each memory as `tables`.

  Attributes:
    config: of the memories.
    num_layers: number L of layers of the residual stream.
  """

  config: MemoryConfig
  num_layers: int = 1

  @nn.compact
  def __call__(self) -> dict[str, jax.Array]:
    return value_tables(self, self.config, self.num_layers)


def pool_values(
  module: nn.Module,
  tables: dict[str, jax.Array],
  name: str,
  index_BTY: jax.Array,
  score_BTYC: jax.Array,
  num_pools: int = 1,
) -> jax.Array:
  """Pools rows of one of a layer's tables, as `lookup.pool_rows` does.

  Args:
    module: the layer that reads.
    tables: of `value_tables`.
    name: of the table.
    index_BTY: row + I * pool, where I counts the rows of the config, however
      many more are stored.
    score_BTYC: [B, T, Y, C] float32.
    num_pools: E.
  Returns:
    [B, T, E, W] float32.
  """
  c = module.config
  if num_pools > 1 and c.stored_rows > c.num_rows:
    index_BTY += (index_BTY // c.num_rows) * (c.stored_rows - c.num_rows)
  scale_BTY = _scales(tables, name, index_BTY)
  if scale_BTY is not None:
    score_BTYC *= scale_BTY[..., None]
  pooled_BTEW = sharded_lookup.pool_rows(
    tables[name], index_BTY, score_BTYC, num_pools, _kernels(c), module.layout
  )
  return _tap(
    module, name, pooled_BTEW, index_BTY=index_BTY, weight_BTYC=score_BTYC
  )


def dot_values(
  module: nn.Module,
  tables: dict[str, jax.Array],
  name: str,
  index_BTY: jax.Array,
  x_BTW: jax.Array,
) -> jax.Array:
  """Multiplies rows of a layer's table with x, as `lookup.dot_rows` does.

  Args:
    module, tables, name: see `pool_values`.
    index_BTY: rows.
    x_BTW: [B, T, W] float.
  Returns:
    [B, T, Y] float32.
  """
  out_BTY = sharded_lookup.dot_rows(
    tables[name], index_BTY, x_BTW, _kernels(module.config), module.layout
  )
  scale_BTY = _scales(tables, name, index_BTY)
  if scale_BTY is not None:
    out_BTY *= scale_BTY
  return _tap(
    module,
    name,
    out_BTY,
    index_BTY=index_BTY,
    vector_BTEW=x_BTW[:, :, None].astype(jnp.float32),
  )


def _kernels(config: MemoryConfig) -> Kernels:
  if config.storage.kernel == "xla":
    return ()
  # Imported only here, because Pallas takes long to import.
  from ultramem_jax.ops.kernels import pallas

  return pallas.KERNELS


def _scales(tables, name, index_BTY):
  """Returns the scales of int8 rows, whatever their pool; None if not int8."""
  scale_I = tables.get(f"{name}_scale")
  return None if scale_I is None else scale_I[index_BTY % scale_I.shape[0]]


def _tap(module, name, output, **read):
  """Sows what was read, and returns output plus its tap.

  At initialization there is neither.
  """
  if module.is_initializing():
    return output
  module.sow("factors", name, read)
  if module.has_variable("taps", name) or module.is_mutable_collection("taps"):
    output += module.variable("taps", name, jnp.zeros_like, output).value
  return output
