"""Rows of a split table brought to the device of the token that reads them.

A device asks for a row once, however many of its tokens read it, and sums the
row's gradients before they travel back. Rows come in rounds, each with room
for what evenly spread reads want: exact however unevenly they fall. G counts
devices, r the rows of a round, Z = N * K the reads of this device.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops.cpu import sort as row_order
from ultramem_jax.ops.sharded.collectives import Shard

# Evenly spread reads take a further round once in so many steps at most.
ONE_ROUND_OF = 100


def room_for(reads: int, rows_held: int, shards: int) -> int:
  """Rows from one device in a round: what evenly spread reads want of it.

  They want about I / P (1 - exp(-Z / I)) distinct rows of each shard; how far
  the most of all P^2 pairs of devices lies above that, Bernstein's inequality
  says. Popular rows only make the distinct ones fewer: a shard of which more
  is wanted holds more than its share of the rows that are read at all.

  Args:
    reads: Z, of one device.
    rows_held: I / P.
    shards: P.
  """
  mean = -rows_held * math.expm1(-reads / (rows_held * shards))
  bound = math.log(ONE_ROUND_OF * shards**2)
  room = mean + bound / 3 + math.sqrt(bound**2 / 9 + 2 * bound * mean)
  return min(reads, rows_held, math.ceil(room))


class _Plan(NamedTuple):
  """Which rows to ask of whom.

  row_Z: the rows, each once, in order, and so those of a device together.
  start_G: where each device's part of them starts.
  device_BNK, rank_BNK: of each read, the device and the row's place in its
    part.
  rounds: until all rows of all devices have come.
  room: rows from one device in a round.
  """

  row_Z: jax.Array
  start_G: jax.Array
  device_BNK: jax.Array
  rank_BNK: jax.Array
  rounds: jax.Array
  room: int

  def ask(self, shard: Shard, turn):
    """Rows that others want of this device in a round, [r]."""
    turn_1r = (turn * self.room + jnp.arange(self.room))[None]
    slot_Gr = self.start_G[:, None] + turn_1r
    wanted_Gr = jnp.take(self.row_Z, slot_Gr, mode="clip")
    return shard.swap(wanted_Gr.reshape(-1), 0, 0)

  def place(self, turn):
    """Of each read: where in the rows of a round it is, and whether it is."""
    rank_BNK = self.rank_BNK - turn * self.room
    here_BNK = (rank_BNK >= 0) & (rank_BNK < self.room)
    here_BNK &= self.device_BNK < self.start_G.size
    place_BNK = self.device_BNK * self.room + rank_BNK
    return jnp.where(here_BNK, place_BNK, 0), here_BNK

  def over_rounds(self, function, carry):
    """carry after carry = function(carry, turn) for every round."""

    def body(carry):
      turn, carry = carry
      return turn + 1, function(carry, turn)

    return jax.lax.while_loop(
      lambda carry: carry[0] < self.rounds, body, (jnp.int32(0), carry)
    )[1]


def _plan(shard, row_BNK, rows_held, room) -> _Plan:
  num_rows = rows_held * shard.count(shard.axes)
  place = dict(
    zip(
      shard.axes,
      jnp.unravel_index(
        row_BNK // rows_held, tuple(shard.sizes[a] for a in shard.axes)
      ),
      strict=True,
    )
  )
  # Of devices with the same tokens, each asks along its own line alone.
  devices = shard.count(shard.apart)
  device_BNK = jnp.zeros_like(row_BNK)
  for axis in shard.apart:
    device_BNK = device_BNK * shard.sizes[axis] + place[axis]
  for axis in shard.alike:
    mine = place[axis] == jax.lax.axis_index(axis)
    device_BNK = jnp.where(mine, device_BNK, devices)
  row_Z, read_Z = row_order.sort_by_row(
    jnp.where(device_BNK < devices, row_BNK, num_rows), num_rows + 1
  )
  is_new_Z = jnp.minimum(jnp.diff(row_Z, prepend=-1), 1)
  nth_Z = jnp.cumsum(is_new_Z) - 1
  nth_BNK = jnp.zeros_like(nth_Z).at[read_Z].set(nth_Z).reshape(row_BNK.shape)
  count_G = jnp.bincount(
    device_BNK.reshape(-1)[read_Z], is_new_Z, length=devices + 1
  )
  start_G = jnp.cumsum(count_G) - count_G
  rounds = jax.lax.pmax(-(-count_G[:-1].max() // room), tuple(shard.sizes))
  return _Plan(
    jnp.zeros_like(row_Z).at[nth_Z].set(row_Z % rows_held),
    start_G[:-1],
    device_BNK,
    nth_BNK - start_G[device_BNK],
    rounds,
    room,
  )


def sum_over_rounds(op, shard: Shard, num_rows: int, table_iW, index_BNK, x):
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
  room = room_for(index_BNK.size, table_iW.shape[0], shard.count(shard.axes))

  def rows_for(table_iW, wanted_r):
    """Its rows that others want, cast before or after, where they are fewer."""
    if wanted_r.size > table_iW.shape[0]:
      return shard.swap(table_iW.astype(travel)[wanted_r], 0, 0)
    return shard.swap(table_iW[wanted_r].astype(travel), 0, 0)

  def forward(table_iW, index_BNK, x):
    plan = _plan(shard, index_BNK % num_rows, table_iW.shape[0], room)

    def add(sum_, turn):
      rows_rW = rows_for(table_iW, plan.ask(shard, turn))
      return sum_ + op(rows_rW, *plan.place(turn), index_BNK, x)

    rows_rW = jax.ShapeDtypeStruct((devices * room, table_iW.shape[1]), travel)
    out = jax.eval_shape(op, rows_rW, *plan.place(jnp.int32(0)), index_BNK, x)
    return plan.over_rounds(add, jnp.zeros(out.shape, out.dtype))

  def backward(residuals, gradient):
    table_iW, index_BNK, x = residuals
    plan = _plan(shard, index_BNK % num_rows, table_iW.shape[0], room)

    def add(carry, turn):
      table_gradient_iW, x_gradient = carry
      wanted_r, where = plan.ask(shard, turn), plan.place(turn)
      rows_rW = rows_for(table_iW, wanted_r)
      _, transpose = jax.vjp(lambda x: op(rows_rW, *where, index_BNK, x), x)
      x_gradient += transpose(gradient)[0].astype(jnp.float32)
      if is_float:
        # A popular row's gradient has many terms, which bfloat16 would lose.
        _, transpose = jax.vjp(
          lambda rows: op(rows, *where, index_BNK, x),
          rows_rW.astype(jnp.float32),
        )
        rows_gradient_rW = shard.swap(
          transpose(gradient)[0].astype(travel), 0, 0
        )
        table_gradient_iW = table_gradient_iW.at[wanted_r].add(
          rows_gradient_rW.astype(table_iW.dtype)
        )
      return table_gradient_iW, x_gradient

    zeros_iW = jnp.zeros_like(table_iW) if is_float else None
    table_gradient_iW, x_gradient = plan.over_rounds(
      add, (zeros_iW, jnp.zeros(x.shape, jnp.float32))
    )
    return table_gradient_iW, None, x_gradient.astype(x.dtype)

  fetch = jax.custom_vjp(forward)
  fetch.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
  out = fetch(table_iW, index_BNK, x)
  return jax.lax.psum(out, shard.alike) if shard.alike else out
