"""Lookups in a table that devices share, and what each form of it moves.

Each device has tokens of its own, and the rows that they read may lie on any
device.

  columns        every device pools its columns for the tokens of all devices,
                 and the pooled columns travel to their tokens (dimension-wise).
  rows_pooled    every device pools its rows for the tokens of all devices, and
                 the sums travel to their tokens.
  rows_unpooled  rows travel to the device of the token, which pools them
                 (number-wise).

Inside a device tokens are flat, [1, T, ...], where T counts its own tokens, or
those of all devices that share the table.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from ultramem_jax.ops import lookup
from ultramem_jax.ops.lookup import Kernels
from ultramem_jax.ops.sharded import fetch
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded.exchange import Exchange
from ultramem_jax.ops.sharded.layout import Layout

PARTITIONS: tuple[str, ...] = ("columns", "rows_pooled", "rows_unpooled")


def bytes_moved(
  partition: str,
  shards: int,
  *,
  reads: int,
  width: int,
  cores: int,
  pools: int,
  itemsize: int,
) -> float:
  """Returns the bytes that a device receives for each of its tokens, forward.

  The paper (section 3.2 and its figure 9) counts for n shards, with
  cores = pools = 1 and itemsize = 2: number-wise
  4 Y (n - 1) / n + 2 Y W (n - 1) / n; dimension-wise
  6 Y (n - 1) + 2 W (n - 1) / n.

  Args:
    partition: one of `PARTITIONS`.
    shards: number of devices that share the table.
    reads: Y, rows that a token reads.
    width: W.
    cores: C, scores of a row.
    pools: E, pooled vectors of a token.
    itemsize: bytes of a score and of a value as they travel; an index has 4.
  """
  part = (shards - 1) / shards
  vectors = itemsize * pools * width
  asked = (4 + itemsize * cores) * reads * (shards - 1)
  return {
    "columns": asked + vectors * part,
    "rows_pooled": asked + vectors * (shards - 1),
    "rows_unpooled": (4 + itemsize * width) * reads * part,
  }[partition]


def bytes_held(
  partition: str,
  shards: int,
  *,
  devices: int,
  tokens: int,
  num_rows: int,
  reads: int,
  width: int,
  cores: int,
  pools: int,
  itemsize: int,
) -> int:
  """Estimates what a device holds at once to exchange a lookup, backward.

  Within a third of what XLA compiles for a CPU.

  Args:
    partition, shards, reads, width, cores, pools, itemsize: see `bytes_moved`.
    devices: those of the shards' devices that have tokens of their own.
    tokens: of each of these devices.
    num_rows: I.
  """
  # Numbers travel in one dtype and are computed with in float32; so are their
  # gradients.
  both = 2 * itemsize + 4
  if partition == "rows_unpooled":
    room = fetch.room_for(tokens * reads, num_rows // shards, shards)
    plan = 8 * 4 * tokens * reads
    rows = devices * room * width * (both + itemsize)
    return plan + rows + tokens * pools * width * both
  slices = cores
  if partition == "columns":
    width //= shards
    slices = math.ceil(cores / shards)
  # Index, pool, row and whether it is there; scores of whole and held rows.
  read = 13 + itemsize * cores + (8 + itemsize) * slices
  return devices * tokens * (reads * read + pools * width * both)


def pool_rows(
  table_IW: jax.Array,
  index_BTY: jax.Array,
  score_BTYC: jax.Array,
  num_pools: int = 1,
  kernels: Kernels = (),
  layout: Layout | None = None,
) -> jax.Array:
  """Computes `lookup.pool_rows` of a table that the devices of a mesh share.

  Arguments and result are global arrays, which the layout splits. Scores and
  pooled vectors travel in its dtype, and are summed over devices in it; a
  device sums its own rows in float32.
  """
  if not layout_lib.spans_devices(layout):
    return lookup.pool_rows(table_IW, index_BTY, score_BTYC, num_pools, kernels)
  num_rows, width = table_IW.shape

  def columns(exchange, table_Iw, index_BTY, score_BTYC):
    score_BTYC = slice_scores(
      exchange.gather(score_BTYC),
      width,
      exchange.count(exchange.table_axes),
      exchange.index(),
    )
    pooled_BTEw = lookup.pool_rows(
      table_Iw, exchange.gather(index_BTY), score_BTYC, num_pools, kernels
    )
    return exchange.columns_to_tokens(pooled_BTEw.astype(exchange.dtype))

  def rows_pooled(exchange, table_iW, index_BTY, score_BTYC):
    index_BTY, held_BTY = _held(
      exchange, exchange.gather(index_BTY), table_iW.shape[0], num_rows
    )
    score_BTYC = jnp.where(held_BTY[..., None], exchange.gather(score_BTYC), 0)
    return exchange.sums_to_tokens(
      lookup.pool_rows(table_iW, index_BTY, score_BTYC, num_pools, kernels)
    )

  def rows_unpooled(exchange, table_iW, index_BTY, score_BTYC):
    def pool(rows_zW, place_BTY, here_BTY, index_BTY, score_BTYC):
      pool_BTY = index_BTY // num_rows
      return lookup.pool_rows(
        rows_zW,
        place_BTY + pool_BTY * rows_zW.shape[0],
        jnp.where(here_BTY[..., None], score_BTYC, 0),
        num_pools,
      )

    return fetch.sum_over_rounds(
      pool, exchange, num_rows, table_iW, index_BTY, score_BTYC
    ).astype(exchange.dtype)

  pooled_BTEW = _run(
    layout,
    (columns, rows_pooled, rows_unpooled),
    table_IW,
    index_BTY,
    score_BTYC.astype(layout.dtype),
  )
  return pooled_BTEW.astype(jnp.float32)


def dot_rows(
  table_IW: jax.Array,
  index_BTY: jax.Array,
  x_BTW: jax.Array,
  kernels: Kernels = (),
  layout: Layout | None = None,
) -> jax.Array:
  """Computes `lookup.dot_rows` of a table that the devices of a mesh share.

  Arguments and result are global arrays, as in `pool_rows`.
  """
  if not layout_lib.spans_devices(layout):
    return lookup.dot_rows(table_IW, index_BTY, x_BTW, kernels)
  num_rows, _ = table_IW.shape

  def columns(exchange, table_Iw, index_BTY, x_BTW):
    return exchange.sums_to_tokens(
      lookup.dot_rows(
        table_Iw,
        exchange.gather(index_BTY),
        exchange.tokens_to_columns(x_BTW),
        kernels,
      )
    )

  def rows_pooled(exchange, table_iW, index_BTY, x_BTW):
    index_BTY, held_BTY = _held(
      exchange, exchange.gather(index_BTY), table_iW.shape[0], num_rows
    )
    dot_BTY = lookup.dot_rows(
      table_iW, index_BTY, exchange.gather(x_BTW), kernels
    )
    return exchange.sums_to_tokens(jnp.where(held_BTY, dot_BTY, 0))

  def rows_unpooled(exchange, table_iW, index_BTY, x_BTW):
    def dot(rows_zW, place_BTY, here_BTY, _, x_BTW):
      dot_BTY = lookup.dot_rows(rows_zW, place_BTY, x_BTW)
      return jnp.where(here_BTY, dot_BTY, 0)

    return fetch.sum_over_rounds(
      dot, exchange, num_rows, table_iW, index_BTY, x_BTW
    ).astype(exchange.dtype)

  dot_BTY = _run(
    layout,
    (columns, rows_pooled, rows_unpooled),
    table_IW,
    index_BTY,
    x_BTW.astype(layout.dtype),
  )
  return dot_BTY.astype(jnp.float32)


def _run(
  layout: Layout,
  forms: tuple[Callable[..., jax.Array], ...],
  table_IW,
  index,
  x,
):
  """Runs the layout's form on every device, with flat tokens.

  Args:
    layout: the form is that of its partition.
    forms: (exchange, table, index, x) -> output, in the order of `PARTITIONS`.
    table_IW: the whole table.
    index, x: [B, T, ...].
  Returns:
    [B, T, ...].
  """
  spec = layout.tokens(*index.shape[:2])
  token_axes = layout.token_axes(*index.shape[:2])
  exchange = Exchange(
    layout.table_axes,
    tuple(axis for axis in layout.table_axes if axis in token_axes),
    tuple(axis for axis in layout.table_axes if axis not in token_axes),
    layout.mesh.shape,
    layout.dtype,
  )
  form = dict(zip(PARTITIONS, forms, strict=True))[layout.partition]

  def local(table, index, x):
    flat = [y.reshape(1, -1, *y.shape[2:]) for y in (index, x)]
    out = form(exchange, table, *flat)
    return out.reshape(*index.shape[:2], *out.shape[2:])

  in_specs = layout.table_spec(), spec, spec
  return layout.shard_map(local, in_specs, spec)(table_IW, index, x)


def slice_scores(
  score_BTYC: jax.Array, width: int, shards: int, index: jax.Array | int
) -> jax.Array:
  """Returns the scores of a shard's columns, one for each run of one core.

  Args:
    score_BTYC: [..., C], the scores of whole rows.
    width: W, of a whole row.
    shards: number of devices that share its columns evenly.
    index: of the shard.
  """
  held, core = width // shards, width // score_BTYC.shape[-1]
  run = math.gcd(held, core)
  first = index * held + run * jnp.arange(held // run, dtype=jnp.int32)
  return jnp.take(score_BTYC, first // core, axis=-1)


def _held(exchange, index_BTY, rows_held, num_rows):
  """Turns indices into the whole table into indices into this device's rows.

  Returns:
    (index_BTY, held_BTY): row 0 for rows that other devices hold; and whether
    this device holds the row.
  """
  pool_BTY, row_BTY = jnp.divmod(index_BTY, num_rows)
  row_BTY -= exchange.index() * rows_held
  held_BTY = (row_BTY >= 0) & (row_BTY < rows_held)
  row_BTY = jnp.where(held_BTY, row_BTY, 0)
  return pool_BTY * rows_held + row_BTY, held_BTY
