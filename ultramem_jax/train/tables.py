"""Value tables apart from the other parameters, and their sparse updates.

A step reads few rows of a table. Differentiated like any other parameter, a
table has a gradient as large as itself, and an optimizer decays and moves all
of its rows. The functions here keep the gradient as factors and update the
rows that were read:

  params, tables = take_tables(params)
  (loss, aux), gradients, factors = sparse_value_and_grad(loss_fn)(
    variables, tables, batch
  )
  tables = update_tables(tables, factors, AdamW(...))

`train.py` takes its steps by them, and so does any Flax model that holds the
memory layers of this package: `examples/memory_in_your_model.py`.

A table is named by its path in the parameters, such as "memory_0/values". One
that several layers share is made by a `SharedTables` of the name `SHARED`,
beside these layers or beside a module around them: "memory_tables/values".
"""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from ultramem_jax.layers.tables import SHARED
from ultramem_jax.ops import precision, row_choice
from ultramem_jax.ops.row_update import AdamW, Factors, Sgd, Table
from ultramem_jax.ops.sharded import row_update as sharded_update
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import few

# The collections in which a lookup reports its gradient: `layers/tables.py`.
TABLE_COLLECTIONS = ("taps", "factors")

Tables = dict[str, Table]
SortedReads = tuple[jax.Array, jax.Array]


class TableGradients(NamedTuple):
  """What `step.model_step` leaves for `step.table_step` to do.

  by_path: by path, the gradient of each table: `Factors` where the update is
    sparse, [I, W] float32 where it is dense.
  reads: by path, the reads of each table in the order of its rows, as
    `sorted_reads` returns them; empty where the update is dense.
  scale: float32 scalar, by which clipping multiplies every gradient.
  step: int32 scalar, the number of this step, counted from 1.
  is_taken: bool scalar, whether the tables change at all.
  """

  by_path: dict[str, Any]
  reads: dict[str, SortedReads]
  scale: jax.Array
  step: jax.Array
  is_taken: jax.Array


def is_table(path: str) -> bool:
  """Returns whether the parameter at path, joined by "/", is a value table."""
  return bool(re.search(r"(^|/)((pre|up|down)_)?values$", path))


def is_memory(path: str) -> bool:
  """Returns whether the parameter at path, joined by "/", is of a memory."""
  return path.startswith("memory")


def split_tables(params: Any) -> tuple[Any, dict[str, jax.Array]]:
  """Returns the parameters without their tables, and the tables by path."""
  flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
  values = {path: flat.pop(path) for path in list(flat) if is_table(path)}
  return traverse_util.unflatten_dict(flat, sep="/"), values


def join_tables(params: Any, tables: Tables) -> Any:
  """Returns the parameters with the values of the tables in their places."""
  flat = traverse_util.flatten_dict(params, sep="/")
  flat |= {path: table.values_IW for path, table in tables.items()}
  return traverse_util.unflatten_dict(flat, sep="/")


def take_tables(
  params: Any, moments: str = "float32", second_moment: str = "element"
) -> tuple[Any, Tables]:
  """Takes the tables out of a model's parameters, and adds Adam's moments.

  Args:
    params: the collection "params" of a model, as `init` returns it.
    moments: "float32" or "bfloat16", the dtype of the moments; "none": the
      rule has none.
    second_moment: "element", or "row": one float32 for each row.
  Returns:
    (params, tables): the other parameters, out of the boxes that name their
    axes; and the tables by path, with moments of zero.
  Raises:
    ConfigError: a table is not [I, W] of a dtype of `precision.DTYPES`, or an
      argument is none of its values.
  """
  require(
    moments in ("float32", "bfloat16", "none"),
    "moments",
    moments,
    "must be 'float32', 'bfloat16' or 'none'",
  )
  require(
    second_moment in ("element", "row"),
    "second_moment",
    second_moment,
    "must be 'element' or 'row'",
  )
  params, values = split_tables(nn.meta.unbox(params))
  for path, values_IW in values.items():
    held = f"{values_IW.dtype}{list(values_IW.shape)}"
    require(
      values_IW.ndim == 2 and values_IW.dtype in precision.DTYPES.values(),
      path,
      held,
      "must be [rows, columns] of float32, or of bfloat16 as "
      "`ops.precision` stores it, to be updated by rows; layers stacked by "
      "nn.scan, and tables cast to another dtype, need the plain gradient",
    )
  return params, {
    path: new_table(values_IW, moments, second_moment)
    for path, values_IW in values.items()
  }


def new_table(values_IW: jax.Array, moments: str, second_moment: str) -> Table:
  """Returns a table with moments of zero; arguments as for `take_tables`."""
  if moments == "none":
    return Table(values_IW, None, None)
  dtype = precision.DTYPES[moments]
  return Table(
    values_IW,
    jnp.zeros(values_IW.shape, dtype),
    jnp.zeros(len(values_IW), jnp.float32)
    if second_moment == "row"
    else jnp.zeros(values_IW.shape, dtype),
  )


def sparse_value_and_grad(loss_fn: Callable) -> Callable:
  """Returns a function like `jax.value_and_grad`'s, with tables as factors.

  Args:
    loss_fn: (variables, *args) -> (loss, aux). It gives the variables to a
      model's `apply`, with `TABLE_COLLECTIONS` among the mutable collections;
      aux is a dict that holds those that `apply` returned, and more if wanted.
  Returns:
    (variables, tables, *args, segment_BT=None) -> ((loss, aux), gradients,
    factors). The variables are those of the model without its tables, which
    `loss_fn` finds in their places. segment_BT [B, T] int32 is 0 where there
    is padding, whose reads are ignored. aux comes without `TABLE_COLLECTIONS`;
    gradients are those of variables["params"]; factors, by path, those of the
    tables. It raises ValueError if a table is read twice by one call of the
    model, or by none of its layers.
  """

  def function(variables, tables: Tables, *args, segment_BT=None):
    def loss(params, taps):
      params = join_tables(params, tables)
      return loss_fn({**variables, "params": params, **taps}, *args)

    params = variables["params"]
    _, shapes = jax.eval_shape(loss, params, {})
    flat: dict[str, Any] = traverse_util.flatten_dict(shapes["taps"], sep="/")
    taps = {
      name: jnp.zeros(x.shape, x.dtype)
      for name, x in flat.items()
      if _table_of(name, tables)
    }
    (value, aux), (gradients, tap_gradients) = jax.value_and_grad(
      lambda params, taps: loss(
        params, {"taps": traverse_util.unflatten_dict(taps, sep="/")}
      ),
      argnums=(0, 1),
      has_aux=True,
    )(params, taps)
    factors = _factors(aux["factors"], tap_gradients, tables, segment_BT)
    aux = {name: x for name, x in aux.items() if name not in TABLE_COLLECTIONS}
    return (value, aux), gradients, factors

  return function


def _factors(read, tap_gradients, tables: Tables, segment_BT):
  """Returns the gradient of every table, of all layers that read it.

  Args:
    read: the collection "factors", in which a layer sows for each table it
      reads the index, and either the weights or the vector.
    tap_gradients: by path, the gradient of the collection "taps", which is the
      other.
    tables: by path.
    segment_BT: 0 where there is padding; None: nowhere.
  Returns:
    Factors by path; positions of batch and layers in one axis, T.
  """
  flat_reads: dict[str, Any] = traverse_util.flatten_dict(read, sep="/")
  parts = {path: [] for path in tables}
  for name, gradient in tap_gradients.items():
    reads = flat_reads[name]
    if len(reads) > 1:
      raise ValueError(
        f"{name} is read {len(reads)} times by one call of the model: its "
        "gradient has factors only if a layer is called once"
      )
    path = _table_of(name, tables)
    num_rows = len(tables[path].values_IW)
    parts[path].append(
      _factors_of_read(reads[0], gradient, segment_BT, num_rows)
    )
  unread = [path for path, of_layers in parts.items() if not of_layers]
  if unread:
    raise ValueError(
      f"{few(unread)}: no memory layer of the model reads this table. Tables "
      f"that layers share must be of a module {SHARED!r} beside them or beside "
      "a module around them; and no other parameter may be named `values`"
    )
  return {
    path: jax.tree.map(lambda *x: jnp.concatenate(x), *of_layers)
    for path, of_layers in parts.items()
  }


def rows_read(
  factors: Any, num_rows: Mapping[str, int], segment_BT: jax.Array
) -> dict[str, jax.Array]:
  """Returns the rows that a model has read, [B, T, Y] int32 by table.

  Args:
    factors: the model's collection of that name.
    num_rows: I of each table, by path.
    segment_BT: [B, T] int32; 0 where there is padding, which reads row I.
  """
  parts = {path: [] for path in num_rows}
  flat_reads: dict[str, Any] = traverse_util.flatten_dict(factors, sep="/")
  for name, (read,) in flat_reads.items():
    path = _table_of(name, num_rows)
    _, row_BTY = _place(read["index_BTY"], segment_BT, num_rows[path])
    parts[path].append(row_BTY)
  return {path: jnp.concatenate(x, axis=-1) for path, x in parts.items()}


def _place(index_BTY, segment_BT, num_rows):
  """Returns the pools and the rows of reads; row I where there is padding."""
  pool_BTY, row_BTY = jnp.divmod(index_BTY, num_rows)
  if segment_BT is not None:
    row_BTY = jnp.where(segment_BT[..., None] > 0, row_BTY, num_rows)
  return pool_BTY, row_BTY


def _table_of(name: str, tables: Mapping[str, Any]) -> str:
  """Returns the path of the table that a read is of; "": it is not trained."""
  *around, values = name.split("/")
  # A shared table stands beside the layer, or beside a module around it.
  shared = (
    "/".join((*around[:depth], SHARED, values))
    for depth in reversed(range(len(around)))
  )
  return next((path for path in (name, *shared) if path in tables), "")


def _factors_of_read(read, tap_gradient, segment_BT, num_rows) -> Factors:
  if "weight_BTYC" in read:
    weight_BTYC, vector_BTEW = read["weight_BTYC"], tap_gradient
  else:
    weight_BTYC, vector_BTEW = tap_gradient[..., None], read["vector_BTEW"]
  pool_BTY, row_BTY = _place(read["index_BTY"], segment_BT, num_rows)
  return merge_leading(Factors(row_BTY, pool_BTY, weight_BTYC, vector_BTEW))


def merge_leading(tree: Any) -> Any:
  """Makes one axis of the first two of every array."""
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def choose_rows(
  factors: dict[str, Factors],
  rarity: Mapping[str, jax.Array],
  top_t: int,
  score: str,
) -> dict[str, Factors]:
  """Returns the gradients of the most special rows, without any of the others.

  Args:
    factors: of the tables, by path.
    rarity: [I] float32 of each table: `row_choice.rarity`.
    top_t, score: as for `row_choice.choose_rows`.
  """
  return {
    path: f._replace(
      row_TY=row_choice.choose_rows(f.row_TY, rarity[path], top_t, score)
    )
    for path, f in factors.items()
  }


def sorted_reads(
  factors: dict[str, Factors], tables: Tables, layout: Layout | None = None
) -> dict[str, SortedReads]:
  """Sorts the reads of each table by row: `ops/sharded/row_update.py`."""
  return {
    path: sharded_update.sort_reads(
      f.row_TY, len(tables[path].values_IW), layout
    )
    for path, f in factors.items()
  }


def global_norm(
  gradients: Any,
  factors: dict[str, Factors],
  tables: Tables,
  reads: dict[str, SortedReads] | None = None,
  layout: Layout | None = None,
) -> jax.Array:
  """Returns the norm of all gradients together, a float32 scalar.

  Args:
    gradients, factors: as `sparse_value_and_grad` gives them.
    tables: by path; only their shapes matter.
    reads: of `sorted_reads`; None: they are sorted here.
    layout: of the tables on a mesh; None: one device.
  """
  reads = reads or sorted_reads(factors, tables, layout)
  squares = sum(
    sharded_update.squared_norm(
      f, reads[path], len(tables[path].values_IW), layout
    )
    for path, f in factors.items()
  )
  return jnp.sqrt(jnp.square(optax.tree.norm(gradients)) + squares)


def update_tables(
  tables: Tables,
  factors: dict[str, Factors],
  rule: AdamW | Sgd,
  scale: Any = 1.0,
  seed: int = 0,
  reads: dict[str, SortedReads] | None = None,
  layout: Layout | None = None,
) -> Tables:
  """Updates the rows that were read; all others stay as they are.

  A row that is not read neither decays nor moves by its momentum, and its
  moments do not fade. The bias of the moments is corrected by the run's step,
  whenever the row was first read.

  Compile it apart from the function that reads the tables, and donate the
  tables to it (`donate_argnums`): a program that reads a table in one loop and
  writes it in another would copy it.

  Args:
    tables: by path.
    factors: their gradients, as `sparse_value_and_grad` gives them.
    rule: at this step.
    scale: a factor on the gradients, to clip them by their norm.
    seed: of the noise by which bfloat16 is rounded.
    reads: of `sorted_reads`; None: they are sorted here.
    layout: of the tables on a mesh; None: one device.
  Returns:
    The tables after the step.
  Raises:
    ValueError: the rule's step is below 1, or a table is int8.
  """
  for path, table in tables.items():
    if table.values_IW.dtype == jnp.int8:
      raise ValueError(f"{path} is int8: such tables are for serving only")
  if isinstance(rule.step, int) and rule.step < 1:
    raise ValueError(f"step = {rule.step}: must be 1 at the first step")
  reads = reads or sorted_reads(factors, tables, layout)
  key = jax.random.fold_in(jax.random.key(seed), 2)
  keys = jax.random.bits(
    jax.random.fold_in(key, rule.step), (len(tables),), jnp.uint32
  )
  return {
    path: sharded_update.update_rows(
      tables[path], factors[path], reads[path], scale, rule, noise_key, layout
    )
    for path, noise_key in zip(sorted(tables), keys, strict=True)
  }
