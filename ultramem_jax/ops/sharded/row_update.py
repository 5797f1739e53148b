"""`row_update` of tables that the devices of a mesh share.

Every device gets the factors of all tokens, which are small, and works on the
part of the table that it holds: no gradient of rows travels. Devices that hold
the same part do the same work. The layout says how tables lie.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ultramem_jax.ops import row_update, shuffle
from ultramem_jax.ops.cpu import sort as row_order
from ultramem_jax.ops.row_update import AdamW, Factors, Sgd, Table
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded import lookup as sharded_lookup
from ultramem_jax.ops.sharded.layout import Layout


def sort_reads(
  row_TY: jax.Array, num_rows: int, layout: Layout | None = None
) -> tuple[jax.Array, jax.Array]:
  """Sorts the reads of a table by row, as `update_rows` wants them.

  Args:
    row_TY: int32 in [0, I]; I marks reads to ignore.
    num_rows: I.
    layout: of the table on a mesh; None: one device.
  Returns:
    (row_Z, read_Z): rows in order, and where in row_TY they stand. If the
    table is split by rows, each shard has its own such pair, and the pairs
    stand one after the other. A shard counts rows from its first, and puts the
    reads of other shards at the end, as one row beyond its last.
  """
  if not layout_lib.spans_devices(layout) or not _by_rows(layout):
    return row_order.sort_by_row(row_TY, num_rows + 1)
  held = num_rows // layout.size(layout.table_axes)

  def sort(row_TY):
    row_TY = row_TY - jax.lax.axis_index(layout.table_axes) * held
    here_TY = (row_TY >= 0) & (row_TY < held)
    return row_order.sort_by_row(jnp.where(here_TY, row_TY, held), held + 1)

  sorted_spec = _reads_spec(layout)
  return layout.shard_map(sort, PartitionSpec(), sorted_spec)(row_TY)


def squared_norm(
  factors: Factors,
  reads: tuple[jax.Array, jax.Array],
  num_rows: int,
  layout: Layout | None = None,
) -> jax.Array:
  """Returns `row_update.squared_norm` of the whole table.

  Args:
    factors, num_rows: as there.
    reads: of `sort_reads`.
    layout: of the table on a mesh; None: one device.
  """
  if not layout_lib.spans_devices(layout):
    return row_update.squared_norm(factors, reads, num_rows)
  shards = layout.size(layout.table_axes)
  held = num_rows // shards if _by_rows(layout) else num_rows

  def norm(factors, reads):
    part = row_update.squared_norm(_columns(layout, factors), reads, held)
    return jax.lax.psum(part, layout.table_axes)

  whole = PartitionSpec()
  in_specs = whole, _reads_spec(layout)
  return layout.shard_map(norm, in_specs, whole)(factors, reads)


def update_rows(
  table: Table,
  factors: Factors,
  reads: tuple[jax.Array, jax.Array],
  scale: jax.Array | float,
  rule: AdamW | Sgd,
  key: jax.Array,
  layout: Layout | None = None,
) -> Table:
  """Computes `row_update.update_rows` of a table that devices share.

  Shards round with noise of their own.

  Args:
    table, factors, scale, rule, key: as there.
    reads: of `sort_reads`.
    layout: of the table on a mesh; None: one device.
  Returns:
    The table, updated in place where it is donated.
  """
  if not layout_lib.spans_devices(layout):
    return row_update.update_rows(table, factors, reads, scale, rule, key)
  spec: Any = layout.table_spec()
  specs = jax.tree.map(lambda x: PartitionSpec(*spec[: x.ndim]), table)

  def update(table, factors, reads, scale, rule, key):
    shard = jax.lax.axis_index(layout.table_axes).astype(jnp.uint32)
    return row_update.update_rows(
      table,
      _columns(layout, factors),
      reads,
      scale,
      rule,
      shuffle.mix(key + shard),
    )

  whole = PartitionSpec()
  in_specs = specs, whole, _reads_spec(layout), whole, whole, whole
  return layout.shard_map(update, in_specs, specs)(
    table, factors, reads, jnp.float32(scale), rule, key
  )


def _by_rows(layout) -> bool:
  return layout.partition != "columns"


def _reads_spec(layout) -> PartitionSpec:
  return PartitionSpec(layout.table_axes if _by_rows(layout) else None)


def _columns(layout, factors: Factors) -> Factors:
  """Returns the factors of the columns that this device holds."""
  if _by_rows(layout):
    return factors
  width = factors.vector_TEW.shape[-1]
  shards = layout.size(layout.table_axes)
  index = jax.lax.axis_index(layout.table_axes)
  held = width // shards
  return factors._replace(
    weight_TYC=sharded_lookup.slice_scores(
      factors.weight_TYC, width, shards, index
    ),
    vector_TEW=jax.lax.dynamic_slice_in_dim(
      factors.vector_TEW, index * held, held, axis=-1
    ),
  )
