"""Rows of a split table brought to the device of the token that reads them.

In rounds, each with room for a little more than the mean number of rows from
one device: exact however unevenly the reads fall. G counts devices, r the rows
of a round, Z = N * K the reads of this device.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops.shard import Shard

# Room for rows from one device, as a multiple of the mean: rows beyond it
# travel in a further round.
SLACK = 1.25


class _Plan(NamedTuple):
  """Which rows to ask of whom.

  row_Z: the rows, sorted by the device asked.
  start_G: where each device's part of them starts.
  device_BNK, rank_BNK: of each read, the device and the place in its part.
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
      row_BNK.reshape(-1)[order_Z], start_G[:-1], device_BNK,
      place_Z.reshape(row_BNK.shape) - start_G[device_BNK], rounds, room,
  )


def sum_over_rounds(
    op, shard: Shard, num_rows: int, table_iW, index_BNK, x
):
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

  def forward(table_iW, index_BNK, x):
    plan = _plan(shard, index_BNK % num_rows, table_iW.shape[0], room)

    def add(sum_, turn):
      rows_rW = shard.swap(table_iW[plan.ask(shard, turn)].astype(travel), 0, 0)
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
    table_gradient_iW, x_gradient = plan.over_rounds(
        add, (zeros_iW, jnp.zeros(x.shape, jnp.float32))
    )
    return table_gradient_iW, None, x_gradient.astype(x.dtype)

  fetch = jax.custom_vjp(forward)
  fetch.defvjp(lambda *inputs: (forward(*inputs), inputs), backward)
  out = fetch(table_iW, index_BNK, x)
  return jax.lax.psum(out, shard.alike) if shard.alike else out
