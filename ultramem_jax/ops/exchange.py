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

import dataclasses
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ultramem_jax import layout as layout_lib
from ultramem_jax.ops import lookup

PARTITIONS = ("columns", "rows_pooled", "rows_unpooled")


def bytes_moved(
    partition: str, shards: int, *, reads: int, width: int, cores: int,
    blocks: int, itemsize: int,
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


def pool_rows(
    table_IW, index_BTK, score_BTKC, num_blocks: int = 1, kernel: str = "xla"
):
  """`lookup.pool_rows` of a table that the devices of a mesh share.

  Arguments and result are those of `lookup.pool_rows`; all are global arrays.
  The layout in force says how they lie. Scores and pooled vectors travel in
  its dtype and are summed in float32 on each device.
  """
  if layout_lib.current() is None:
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
          rows_rW, place_BNK + block_BNK * rows_rW.shape[0],
          jnp.where(here_BNK[..., None], score_BNKC, 0), num_blocks,
      )

    return _fetch(
        pool, shard, num_rows, table_iW, index_BNK, score_BNKC
    ).astype(shard.dtype)

  pooled_BTEW = _run(
      (columns, rows_pooled, rows_unpooled), table_IW, index_BTK,
      score_BTKC.astype(layout_lib.current().dtype),
  )
  return pooled_BTEW.astype(jnp.float32)


def dot_rows(table_IW, index_BTK, x_BTW, kernel: str = "xla"):
  """`lookup.dot_rows` of a table that the devices of a mesh share.

  Arguments and result are those of `lookup.dot_rows`, as for `pool_rows`.
  """
  if layout_lib.current() is None:
    return lookup.dot_rows(table_IW, index_BTK, x_BTW, kernel)
  num_rows, _ = table_IW.shape

  def columns(shard, table_Iw, index_BNK, x_BNW):
    return shard.sums_to_tokens(lookup.dot_rows(
        table_Iw, shard.gather(index_BNK), shard.tokens_to_columns(x_BNW),
        kernel,
    ))

  def rows_pooled(shard, table_iW, index_BNK, x_BNW):
    index_BNK, held_BNK = _held(
        shard, shard.gather(index_BNK), table_iW.shape[0], num_rows
    )
    dot_BNK = lookup.dot_rows(
        table_iW, index_BNK, shard.gather(x_BNW), kernel
    )
    return shard.sums_to_tokens(jnp.where(held_BNK, dot_BNK, 0))

  def rows_unpooled(shard, table_iW, index_BNK, x_BNW):
    def dot(rows_rW, place_BNK, here_BNK, _, x_BNW):
      dot_BNK = lookup.dot_rows(rows_rW, place_BNK, x_BNW)
      return jnp.where(here_BNK, dot_BNK, 0)

    return _fetch(
        dot, shard, num_rows, table_iW, index_BNK, x_BNW
    ).astype(shard.dtype)

  dot_BTK = _run(
      (columns, rows_pooled, rows_unpooled), table_IW, index_BTK,
      x_BTW.astype(layout_lib.current().dtype),
  )
  return dot_BTK.astype(jnp.float32)


def count_rows(count_S, slot_BTK):
  """Adds one to count[slot] for every slot in [0, S); the counts are split.

  Args:
    count_S: [S] int32, split over the table's axes where they divide it.
    slot_BTK: [B, T, K] int32; those past the end do not count.
  """
  layout = layout_lib.current()
  if layout is None:
    return count_S.at[slot_BTK].add(1, mode="drop")
  axes = layout.dividing(layout.table_axes, count_S.size)
  spec = layout.tokens(*slot_BTK.shape[:2])
  apart = _apart(spec)

  def count(count_s, slot_BNK):
    shared = tuple(axis for axis in apart if axis in axes)
    if shared:
      slot_BNK = jax.lax.all_gather(slot_BNK, shared)
    if axes:
      slot_BNK -= jax.lax.axis_index(axes) * count_s.size
    # A negative index would count from the end.
    slot_BNK = jnp.where(slot_BNK < 0, count_s.size, slot_BNK)
    new_s = jnp.zeros_like(count_s).at[slot_BNK].add(1, mode="drop")
    others = tuple(axis for axis in apart if axis not in axes)
    return count_s + (jax.lax.psum(new_s, others) if others else new_s)

  return jax.shard_map(
      count, mesh=layout.mesh, in_specs=(PartitionSpec(axes), spec),
      out_specs=PartitionSpec(axes), check_vma=False,
  )(count_S, slot_BTK)


def _apart(spec: PartitionSpec) -> tuple[str, ...]:
  """The mesh axes along which tokens of this split differ."""
  return tuple(
      axis for part in spec if part
      for axis in ((part,) if isinstance(part, str) else part)
  )


@dataclasses.dataclass(frozen=True)
class _Shard:
  """What a device knows of the others, within `shard_map`.

  axes: of the table, in the order of the mesh.
  apart: those of them along which devices hold other tokens.
  alike: those along which they hold the same.
  sizes: of the mesh's axes.
  dtype: in which numbers travel.
  """

  axes: tuple[str, ...]
  apart: tuple[str, ...]
  alike: tuple[str, ...]
  sizes: Mapping[str, int]
  dtype: str

  def count(self, axes) -> int:
    return math.prod(self.sizes[axis] for axis in axes)

  def index(self):
    """The number of this device's shard."""
    return jax.lax.axis_index(self.axes) if self.axes else 0

  def gather(self, x):
    """[B, N, ...] of the tokens of all devices that share the table."""
    if not self.apart:
      return x
    return jax.lax.all_gather(x, self.apart, axis=1, tiled=True)

  def swap(self, x, split: int, join: int):
    """Sends the parts of axis `split` to the devices `apart`, each its own.

    Those that come are joined along `join`, as jax.lax.all_to_all over all the
    mesh's axes at once would do it. One axis after the other moves each part
    the same way over a torus of chips; for all at once, XLA's TPU compiler
    plans the way of every pair of devices, half a minute for 256.
    """
    sizes = tuple(self.sizes[axis] for axis in self.apart)
    x = x.reshape(*x.shape[:split], *sizes, -1, *x.shape[split + 1 :])
    for place, axis in enumerate(self.apart, split):
      x = jax.lax.all_to_all(x, axis, place, place, tiled=True)
    count = len(sizes)
    x = jnp.moveaxis(
        x, range(split, split + count), range(join, join + count)
    )
    return x.reshape(*x.shape[:join], -1, *x.shape[join + count + 1 :])

  def sums_to_tokens(self, x):
    """Adds up the parts [B, N of all, ...] of all shards: [B, N, ...]."""
    x = x.astype(self.dtype)
    if self.apart:
      x = jax.lax.psum_scatter(x, self.apart, scatter_dimension=1, tiled=True)
    return jax.lax.psum(x, self.alike) if self.alike else x

  def columns_to_tokens(self, x):
    """[B, N of all, ..., W / P] -> [B, N, ..., W]."""
    x = self.swap(x, 1, x.ndim - 1)
    if self.alike:
      x = jax.lax.all_gather(x, self.alike, axis=x.ndim - 1, tiled=True)
    return self._reorder(x, self.alike + self.apart, self.axes)

  def tokens_to_columns(self, x):
    """[B, N, W] -> [B, N of all, W / P]."""
    x = self._reorder(x, self.axes, self.alike + self.apart)
    if self.alike:
      width = x.shape[-1] // self.count(self.alike)
      start = jax.lax.axis_index(self.alike) * width
      x = jax.lax.dynamic_slice_in_dim(x, start, width, axis=-1)
    return self.swap(x, x.ndim - 1, 1)

  def _reorder(self, x, held, wanted):
    """Slices of the last axis, from the order of some axes to another."""
    if held == wanted:
      return x
    lead = x.ndim - 1
    sliced = x.reshape(*x.shape[:-1], *(self.sizes[a] for a in held), -1)
    order = [lead + held.index(axis) for axis in wanted]
    sliced = sliced.transpose(*range(lead), *order, sliced.ndim - 1)
    return sliced.reshape(x.shape)


def _run(forms, table_IW, index_BTK, x):
  """Runs the form of the layout on every device, its tokens as [1, N, ...]."""
  layout = layout_lib.current()
  spec = layout.tokens(*index_BTK.shape[:2])
  apart = _apart(spec)
  shard = _Shard(
      layout.table_axes,
      tuple(axis for axis in layout.table_axes if axis in apart),
      tuple(axis for axis in layout.table_axes if axis not in apart),
      layout.mesh.shape, layout.dtype,
  )
  form = dict(zip(PARTITIONS, forms, strict=True))[layout.partition]

  def local(table, index_BTK, x):
    flat = [y.reshape(1, -1, *y.shape[2:]) for y in (index_BTK, x)]
    out = form(shard, table, *flat)
    return out.reshape(*index_BTK.shape[:2], *out.shape[2:])

  return jax.shard_map(
      local, mesh=layout.mesh, in_specs=(layout.table_spec(), spec, spec),
      out_specs=spec, check_vma=False,
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


# Room for rows from one device, as a multiple of the mean: rows beyond it
# travel in a further round.
SLACK = 1.25


class _Plan(NamedTuple):
  """Which rows to ask of whom, Z = N * K reads of this device.

  row_Z: the rows, sorted by the device asked; start_G, count_G: each device's
    part of them.
  device_BNK, rank_BNK: of each read, the device and the place in its part.
  rounds: until all rows of all devices have come.
  """

  row_Z: jax.Array
  start_G: jax.Array
  count_G: jax.Array
  device_BNK: jax.Array
  rank_BNK: jax.Array
  rounds: jax.Array


def _plan(shard, row_BNK, rows_held, room) -> _Plan:
  shard_BNK, row_BNK = jnp.divmod(row_BNK, rows_held)
  place = dict(zip(
      shard.axes,
      jnp.unravel_index(shard_BNK, tuple(shard.sizes[a] for a in shard.axes)),
      strict=True,
  ))
  # Of devices with the same tokens, each asks along its own line alone.
  devices = shard.count(shard.apart)
  device_BNK = jnp.zeros_like(row_BNK)
  for axis in shard.apart:
    device_BNK = device_BNK * shard.sizes[axis] + place[axis]
  for axis in shard.alike:
    mine = place[axis] == jax.lax.axis_index(axis)
    device_BNK = jnp.where(mine, device_BNK, devices)
  device_Z = device_BNK.reshape(-1)
  order_Z = jnp.argsort(device_Z, stable=True)
  place_Z = jnp.zeros_like(order_Z).at[order_Z].set(jnp.arange(order_Z.size))
  count_G = jnp.bincount(device_Z, length=devices + 1)
  start_G = jnp.cumsum(count_G) - count_G
  rounds = jax.lax.pmax(
      -(-count_G[:-1].max() // room), tuple(shard.sizes)
  )
  return _Plan(
      row_BNK.reshape(-1)[order_Z], start_G[:-1], count_G[:-1], device_BNK,
      place_Z.reshape(row_BNK.shape) - start_G[device_BNK], rounds,
  )


def _fetch(op, shard, num_rows, table_iW, index_BNK, x):
  """Sums op(rows, place, here, index, x) over rounds in which rows come.

  Args:
    op: of rows [r, W], their numbers in `rows` [B, N, K], whether they are in
      this round [B, N, K], index and x; linear in rows.
    shard: of this device.
    num_rows: I, of the whole table.
    table_iW: the rows that this device holds.
    index_BNK: what its tokens read, row + I * block.
    x: floats of its tokens.
  Returns:
    The sum, over the devices that hold the same tokens too. Differentiable in
    table, if float, and x; in the backward the rows travel again.
  """
  is_float = jnp.issubdtype(table_iW.dtype, jnp.floating)
  travel = shard.dtype if is_float else table_iW.dtype
  devices = shard.count(shard.apart)
  reads = index_BNK.size
  room = min(reads, math.ceil(SLACK * reads / shard.count(shard.axes)) + 8)

  def ask(plan, turn):
    """Rows that others want of this device, [r]."""
    slot_Gr = plan.start_G[:, None] + (turn * room + jnp.arange(room))[None]
    wanted_Gr = jnp.take(plan.row_Z, slot_Gr, mode="clip")
    return shard.swap(wanted_Gr.reshape(-1), 0, 0)

  def place(plan, turn):
    rank_BNK = plan.rank_BNK - turn * room
    here_BNK = (rank_BNK >= 0) & (rank_BNK < room)
    here_BNK &= plan.device_BNK < devices
    return jnp.where(here_BNK, plan.device_BNK * room + rank_BNK, 0), here_BNK

  def over_rounds(function, plan, carry):
    def body(carry):
      turn, carry = carry
      return turn + 1, function(carry, turn)

    return jax.lax.while_loop(
        lambda carry: carry[0] < plan.rounds, body, (jnp.int32(0), carry)
    )[1]

  def forward(table_iW, index_BNK, x):
    plan = _plan(shard, index_BNK % num_rows, table_iW.shape[0], room)

    def add(sum_, turn):
      rows_rW = shard.swap(table_iW[ask(plan, turn)].astype(travel), 0, 0)
      return sum_ + op(rows_rW, *place(plan, turn), index_BNK, x)

    rows_rW = jax.ShapeDtypeStruct((devices * room, table_iW.shape[1]), travel)
    out = jax.eval_shape(op, rows_rW, *place(plan, 0), index_BNK, x)
    return over_rounds(add, plan, jnp.zeros(out.shape, out.dtype))

  def backward(residuals, gradient):
    table_iW, index_BNK, x = residuals
    plan = _plan(shard, index_BNK % num_rows, table_iW.shape[0], room)

    def add(carry, turn):
      table_gradient_iW, x_gradient = carry
      wanted_r, where = ask(plan, turn), place(plan, turn)
      rows_rW = shard.swap(table_iW[wanted_r].astype(travel), 0, 0)
      _, transpose = jax.vjp(lambda x: op(rows_rW, *where, index_BNK, x), x)
      x_gradient += transpose(gradient)[0].astype(jnp.float32)
      if is_float:
        _, transpose = jax.vjp(
            lambda rows: op(rows, *where, index_BNK, x), rows_rW
        )
        rows_gradient_rW = shard.swap(
            transpose(gradient)[0].astype(travel), 0, 0
        )
        table_gradient_iW = table_gradient_iW.at[wanted_r].add(
            rows_gradient_rW.astype(table_iW.dtype)
        )
      return table_gradient_iW, x_gradient

    zeros_iW = jnp.zeros_like(table_iW) if is_float else None
    table_gradient_iW, x_gradient = over_rounds(
        add, plan, (zeros_iW, jnp.zeros(x.shape, jnp.float32))
    )
    return table_gradient_iW, None, x_gradient.astype(x.dtype)

  fetch = jax.custom_vjp(forward)
  fetch.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
  out = fetch(table_iW, index_BNK, x)
  return jax.lax.psum(out, shard.alike) if shard.alike else out
