"""Tables split over the mesh: what each form moves, and the forms.

P devices share a table. Each of them has its own tokens, K rows to read for
each, which may lie anywhere.

  columns        every device pools its slice of W for the tokens of all, and
                 the slices travel to their tokens (dimension-wise).
  rows_pooled    every device pools the rows it holds for the tokens of all,
                 and the sums travel to their tokens.
  rows_unpooled  rows travel to the device of the token, which pools them
                 (number-wise).
"""

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ultramem_jax.ops import lookup
from ultramem_jax.ops.sharded import fetch
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded.collectives import Shard
from ultramem_jax.ops.sharded.layout import Layout

PARTITIONS = ("columns", "rows_pooled", "rows_unpooled")


def bytes_moved(
  partition: str,
  shards: int,
  *,
  reads: int,
  width: int,
  cores: int,
  blocks: int,
  itemsize: int,
) -> float:
  """Bytes that a device receives for each of its tokens, forward.

  The paper (section 3.2 and its figure 9) counts with cores = blocks = 1 and
  itemsize = 2: number-wise 4 K (P - 1) / P + 2 K W (P - 1) / P; dimension-wise
  6 K (P - 1) + 2 W (P - 1) / P.

  Args:
    partition: of `PARTITIONS`.
    shards: P.
    reads: K, rows of a token.
    width: W.
    cores: C, scores of a row.
    blocks: E, pooled vectors of a token.
    itemsize: bytes of a score and of a value as they travel; an index has 4.
  """
  part = (shards - 1) / shards
  vectors = itemsize * blocks * width
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
  blocks: int,
  itemsize: int,
) -> int:
  """Estimate of what a device holds at once to exchange a lookup, backward.

  Within a third of what XLA compiles for a CPU.

  Args:
    partition, shards, reads, width, cores, blocks, itemsize: of `bytes_moved`.
    devices: those of the P that have tokens of their own.
    tokens: of each of them.
    num_rows: I.
  """
  # Numbers travel, and are worked with in float32; so are their gradients.
  both = 2 * itemsize + 4
  if partition == "rows_unpooled":
    room = fetch.room_for(tokens * reads, num_rows // shards, shards)
    plan = 8 * 4 * tokens * reads
    rows = devices * room * width * (both + itemsize)
    return plan + rows + tokens * blocks * width * both
  slices = cores
  if partition == "columns":
    width //= shards
    slices = math.ceil(cores / shards)
  # Index, block, row and whether it is there; scores of whole and held rows.
  read = 13 + itemsize * cores + (8 + itemsize) * slices
  return devices * tokens * (reads * read + blocks * width * both)


def pool_rows(
  table_IW,
  index_BTK,
  score_BTKC,
  num_blocks: int = 1,
  kernel: str = "xla",
  layout: Layout | None = None,
):
  """`lookup.pool_rows` of a table that the devices of a mesh share.

  Arguments and result are those of `lookup.pool_rows`; all are global arrays,
  and the layout says how they are split. Scores and pooled vectors travel in
  its dtype and are summed in float32 on each device.
  """
  if not layout_lib.spans_devices(layout):
    return lookup.pool_rows(table_IW, index_BTK, score_BTKC, num_blocks, kernel)
  num_rows, width = table_IW.shape

  def columns(shard, table_Iw, index_BNK, score_BNKC):
    score_BNKC = slice_scores(
      shard.gather(score_BNKC), width, shard.count(shard.axes), shard.index()
    )
    pooled_BNEw = lookup.pool_rows(
      table_Iw, shard.gather(index_BNK), score_BNKC, num_blocks, kernel
    )
    return shard.columns_to_tokens(pooled_BNEw.astype(shard.dtype))

  def rows_pooled(shard, table_iW, index_BNK, score_BNKC):
    index_BNK, held_BNK = _held(
      shard, shard.gather(index_BNK), table_iW.shape[0], num_rows
    )
    score_BNKC = jnp.where(held_BNK[..., None], shard.gather(score_BNKC), 0)
    return shard.sums_to_tokens(
      lookup.pool_rows(table_iW, index_BNK, score_BNKC, num_blocks, kernel)
    )

  def rows_unpooled(shard, table_iW, index_BNK, score_BNKC):
    def pool(rows_rW, place_BNK, here_BNK, index_BNK, score_BNKC):
      block_BNK = index_BNK // num_rows
      return lookup.pool_rows(
        rows_rW,
        place_BNK + block_BNK * rows_rW.shape[0],
        jnp.where(here_BNK[..., None], score_BNKC, 0),
        num_blocks,
      )

    return fetch.sum_over_rounds(
      pool, shard, num_rows, table_iW, index_BNK, score_BNKC
    ).astype(shard.dtype)

  pooled_BTEW = _run(
    layout,
    (columns, rows_pooled, rows_unpooled),
    table_IW,
    index_BTK,
    score_BTKC.astype(layout.dtype),
  )
  return pooled_BTEW.astype(jnp.float32)


def dot_rows(
  table_IW, index_BTK, x_BTW, kernel: str = "xla", layout: Layout | None = None
):
  """`lookup.dot_rows` of a table that the devices of a mesh share.

  Arguments and result are those of `lookup.dot_rows`, as for `pool_rows`.
  """
  if not layout_lib.spans_devices(layout):
    return lookup.dot_rows(table_IW, index_BTK, x_BTW, kernel)
  num_rows, _ = table_IW.shape

  def columns(shard, table_Iw, index_BNK, x_BNW):
    return shard.sums_to_tokens(
      lookup.dot_rows(
        table_Iw,
        shard.gather(index_BNK),
        shard.tokens_to_columns(x_BNW),
        kernel,
      )
    )

  def rows_pooled(shard, table_iW, index_BNK, x_BNW):
    index_BNK, held_BNK = _held(
      shard, shard.gather(index_BNK), table_iW.shape[0], num_rows
    )
    dot_BNK = lookup.dot_rows(table_iW, index_BNK, shard.gather(x_BNW), kernel)
    return shard.sums_to_tokens(jnp.where(held_BNK, dot_BNK, 0))

  def rows_unpooled(shard, table_iW, index_BNK, x_BNW):
    def dot(rows_rW, place_BNK, here_BNK, _, x_BNW):
      dot_BNK = lookup.dot_rows(rows_rW, place_BNK, x_BNW)
      return jnp.where(here_BNK, dot_BNK, 0)

    return fetch.sum_over_rounds(
      dot, shard, num_rows, table_iW, index_BNK, x_BNW
    ).astype(shard.dtype)

  dot_BTK = _run(
    layout,
    (columns, rows_pooled, rows_unpooled),
    table_IW,
    index_BTK,
    x_BTW.astype(layout.dtype),
  )
  return dot_BTK.astype(jnp.float32)


def count_rows(count_S, slot_BTK, layout: Layout | None = None):
  """Adds one to count[slot] for every slot in [0, S); the counts are split.

  What is fewer travels: slots to the devices that count them, or the counts of
  each device's own slots, to be added up.

  Args:
    count_S: [S] int32, split over the table's axes where they divide it.
    slot_BTK: [B, T, K] int32; those past the end do not count.
    layout: None: one device.
  """
  if not layout_lib.spans_devices(layout):
    return count_S.at[slot_BTK].add(1, mode="drop")
  axes = layout.dividing(layout.table_axes, count_S.size)
  spec = layout.tokens(*slot_BTK.shape[:2])
  apart = axes_apart(spec)

  shared = tuple(axis for axis in apart if axis in axes)

  def count_all(slot_BNK):
    """Of all slots, the part of the counts that this device holds."""
    held = count_S.size // layout.size(axes)
    if shared:
      slot_BNK = jax.lax.all_gather(slot_BNK, shared)
    if axes:
      slot_BNK -= jax.lax.axis_index(axes) * held
    # A negative index would count from the end.
    slot_BNK = jnp.where(slot_BNK < 0, held, slot_BNK)
    return jnp.zeros(held, jnp.int32).at[slot_BNK].add(1, mode="drop")

  def count_own(slot_BNK):
    """The same, from the counts of each device's own slots."""
    new_S = jnp.zeros(count_S.size, jnp.int32).at[slot_BNK].add(1, mode="drop")
    for axis in axes:
      parts_Ps = new_S.reshape(layout.size((axis,)), -1)
      if axis in shared:
        new_S = jax.lax.psum_scatter(parts_Ps, axis)
      else:
        new_S = parts_Ps[jax.lax.axis_index(axis)]
    return new_S

  def count(count_s, slot_BNK):
    new_s = (count_all if slot_BTK.size < count_S.size else count_own)(slot_BNK)
    others = tuple(axis for axis in apart if axis not in axes)
    return count_s + (jax.lax.psum(new_s, others) if others else new_s)

  return jax.shard_map(
    count,
    mesh=layout.mesh,
    in_specs=(PartitionSpec(axes), spec),
    out_specs=PartitionSpec(axes),
    check_vma=False,
  )(count_S, slot_BTK)


def axes_apart(spec: PartitionSpec) -> tuple[str, ...]:
  """The mesh axes along which tokens of this split differ."""
  return tuple(
    axis
    for part in spec
    if part
    for axis in ((part,) if isinstance(part, str) else part)
  )


def _run(layout: Layout, forms, table_IW, index_BTK, x):
  """Runs the form of the layout on every device, its tokens as [1, N, ...]."""
  spec = layout.tokens(*index_BTK.shape[:2])
  apart = axes_apart(spec)
  shard = Shard(
    layout.table_axes,
    tuple(axis for axis in layout.table_axes if axis in apart),
    tuple(axis for axis in layout.table_axes if axis not in apart),
    layout.mesh.shape,
    layout.dtype,
  )
  form = dict(zip(PARTITIONS, forms, strict=True))[layout.partition]

  def local(table, index_BTK, x):
    flat = [y.reshape(1, -1, *y.shape[2:]) for y in (index_BTK, x)]
    out = form(shard, table, *flat)
    return out.reshape(*index_BTK.shape[:2], *out.shape[2:])

  return jax.shard_map(
    local,
    mesh=layout.mesh,
    in_specs=(layout.table_spec(), spec, spec),
    out_specs=spec,
    check_vma=False,
  )(table_IW, index_BTK, x)


def slice_scores(score_BNKC, width: int, shards: int, index):
  """Scores of a shard's columns, one for each run of columns of one core.

  Args:
    score_BNKC: [..., C], of a whole row.
    width: W, of a whole row.
    shards: P, which share its columns evenly.
    index: of the shard.
  """
  held, core = width // shards, width // score_BNKC.shape[-1]
  run = math.gcd(held, core)
  first = index * held + run * jnp.arange(held // run)
  return jnp.take(score_BNKC, first // core, axis=-1)


def _held(shard, index_BNK, rows_held, num_rows):
  """(index into this device's rows, whether it is there; else its row 0)."""
  block_BNK, row_BNK = jnp.divmod(index_BNK, num_rows)
  row_BNK -= shard.index() * rows_held
  held_BNK = (row_BNK >= 0) & (row_BNK < rows_held)
  row_BNK = jnp.where(held_BNK, row_BNK, 0)
  return block_BNK * rows_held + row_BNK, held_BNK
