"""Rows of a sharded table, brought to the device of the token that reads them.

A device asks for a row once, however many of its tokens read it, and sums the
row's gradients before they travel back. Rows arrive in rounds, each with room
for as many rows as evenly spread reads want; the result is exact however
unevenly reads fall. Z counts the reads of one device, z the rows of a round
from one device, and O the devices.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops.cpu.sort import sort_by_row
from ultramem_jax.ops.sharded.exchange import Exchange

# Evenly spread reads need a second round at most once in this many steps.
ONE_ROUND_OF = 100


def room_for(reads: int, rows_held: int, shards: int) -> int:
  """Returns how many rows of one device a round has room for.

  Evenly spread reads want about (I / n) (1 - exp(-Z / I)) distinct rows of each
  of n shards; Bernstein's inequality bounds how far the most of all n^2 pairs
  of devices lies above that. Popular rows only make the distinct ones fewer: a
  shard of which more rows are wanted holds more than its share of all rows that
  are read.

  Args:
    reads: Z, of one device.
    rows_held: I / n.
    shards: n.
  """
  mean = -rows_held * math.expm1(-reads / (rows_held * shards))
  bound = math.log(ONE_ROUND_OF * shards**2)
  room = mean + bound / 3 + math.sqrt(bound**2 / 9 + 2 * bound * mean)
  return min(reads, rows_held, math.ceil(room))


class Plan(NamedTuple):
  """Which rows a device asks of which other device, and in which round.

  row_Z: the rows, each once, by the device that holds them, and counted from
    its first row.
  start_O: where the rows of each device start.
  device_BTY: the device of each read.
  rank_BTY: the place of each read's row among the rows of its device.
  rounds: number of rounds until all rows of all devices have arrived.
  room: rows from one device in a round.
  """

  row_Z: jax.Array
  start_O: jax.Array
  device_BTY: jax.Array
  rank_BTY: jax.Array
  rounds: jax.Array
  room: int

  def ask(self, exchange: Exchange, turn: jax.Array) -> jax.Array:
    """Returns the rows that others want of this device in a round, flat."""
    turn_1z = (turn * self.room + jnp.arange(self.room, dtype=jnp.int32))[None]
    slot_Oz = self.start_O[:, None] + turn_1z
    wanted_Oz = jnp.take(self.row_Z, slot_Oz, mode="clip")
    return exchange.all_to_all(wanted_Oz.reshape(-1), 0, 0)

  def place(self, turn: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns where each read's row is in a round, and whether it is there."""
    rank_BTY = self.rank_BTY - turn * self.room
    here_BTY = (rank_BTY >= 0) & (rank_BTY < self.room)
    here_BTY &= self.device_BTY < self.start_O.size
    place_BTY = self.device_BTY * self.room + rank_BTY
    return jnp.where(here_BTY, place_BTY, 0), here_BTY

  def over_rounds(
    self, function: Callable[[Any, jax.Array], Any], carry: Any
  ) -> Any:
    """Folds function over rounds: (carry, round) -> carry."""

    def body(carry):
      turn, carry = carry
      return turn + 1, function(carry, turn)

    return jax.lax.while_loop(
      lambda carry: carry[0] < self.rounds, body, (jnp.int32(0), carry)
    )[1]


def plan(exchange: Exchange, row_BTY: jax.Array, rows_held: int) -> Plan:
  """Plans how the rows of a device's reads are fetched.

  Args:
    exchange: between the devices that share the table.
    row_BTY: what this device reads, rows of the whole table.
    rows_held: rows of each device.
  """
  shards = exchange.count(exchange.table_axes)
  num_rows, room = rows_held * shards, room_for(row_BTY.size, rows_held, shards)
  place = dict(
    zip(
      exchange.table_axes,
      jnp.unravel_index(
        row_BTY // rows_held,
        tuple(exchange.sizes[a] for a in exchange.table_axes),
      ),
      strict=True,
    )
  )
  # Devices with the same tokens share the work: each asks only the devices on
  # its own line.
  devices = exchange.count(exchange.token_axes)
  device_BTY = jnp.zeros_like(row_BTY)
  for axis in exchange.token_axes:
    device_BTY = device_BTY * exchange.sizes[axis] + place[axis]
  for axis in exchange.copy_axes:
    mine = place[axis] == jax.lax.axis_index(axis)
    device_BTY = jnp.where(mine, device_BTY, devices)
  row_Z, read_Z = sort_by_row(
    jnp.where(device_BTY < devices, row_BTY, num_rows), num_rows + 1
  )
  is_new_Z = jnp.minimum(jnp.diff(row_Z, prepend=-1), 1)
  nth_Z = jnp.cumsum(is_new_Z, dtype=jnp.int32) - 1
  nth_BTY = jnp.zeros_like(nth_Z).at[read_Z].set(nth_Z).reshape(row_BTY.shape)
  count_O = jnp.bincount(
    device_BTY.reshape(-1)[read_Z], is_new_Z, length=devices + 1
  )
  start_O = jnp.cumsum(count_O, dtype=jnp.int32) - count_O
  rounds = jax.lax.pmax(-(-count_O[:-1].max() // room), tuple(exchange.sizes))
  return Plan(
    jnp.zeros_like(row_Z).at[nth_Z].set(row_Z % rows_held),
    start_O[:-1],
    device_BTY,
    nth_BTY - start_O[device_BTY],
    rounds,
    room,
  )


def sum_over_rounds(
  op: Callable[..., jax.Array],
  exchange: Exchange,
  num_rows: int,
  table_iW: jax.Array,
  index_BTY: jax.Array,
  x: jax.Array,
) -> jax.Array:
  """Sums op(rows, place, here, index, x) over the rounds in which rows arrive.

  Args:
    op: linear in its rows [O * z, W]. place and here, both [B, T, Y], say which
      of the rows each read wants, and whether it is among them.
    exchange: between the devices that share the table.
    num_rows: I, of the whole table.
    table_iW: the rows that this device holds.
    index_BTY: what its tokens read, row + I * pool.
    x: floats of its tokens.
  Returns:
    The sum, also over the devices that hold the same tokens. Differentiable in
    table, if float, and x; in the backward the rows travel again.
  """
  out: Any = _sum_over_rounds(op, exchange, num_rows, table_iW, index_BTY, x)
  return jax.lax.psum(out, exchange.copy_axes) if exchange.copy_axes else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sum_over_rounds(
  op, exchange, num_rows, table_iW, index_BTY, x
) -> jax.Array:
  planned = plan(exchange, index_BTY % num_rows, table_iW.shape[0])

  def add(sum_, turn):
    rows_zW = _rows(exchange, table_iW, planned.ask(exchange, turn))
    return sum_ + op(rows_zW, *planned.place(turn), index_BTY, x)

  rows_zW = jax.ShapeDtypeStruct(
    (planned.start_O.size * planned.room, table_iW.shape[1]),
    _travel_dtype(exchange, table_iW),
  )
  where = planned.place(jnp.int32(0))
  out = jax.eval_shape(op, rows_zW, *where, index_BTY, x)
  return planned.over_rounds(add, jnp.zeros(out.shape, out.dtype))


def _forward(op, exchange, num_rows, *inputs):
  return _sum_over_rounds(op, exchange, num_rows, *inputs), inputs


def _backward(op, exchange, num_rows, residuals, gradient):
  table_iW, index_BTY, x = residuals
  planned = plan(exchange, index_BTY % num_rows, table_iW.shape[0])
  is_float = jnp.issubdtype(table_iW.dtype, jnp.floating)

  def add(carry, turn):
    table_gradient_iW, x_gradient = carry
    wanted, where = planned.ask(exchange, turn), planned.place(turn)
    rows_zW = _rows(exchange, table_iW, wanted)
    _, transpose = jax.vjp(lambda x: op(rows_zW, *where, index_BTY, x), x)
    x_gradient += transpose(gradient)[0].astype(jnp.float32)
    if is_float:
      # A popular row's gradient has many terms, which bfloat16 would lose.
      _, transpose = jax.vjp(
        lambda rows: op(rows, *where, index_BTY, x), rows_zW.astype(jnp.float32)
      )
      travelling_zW = transpose(gradient)[0].astype(exchange.dtype)
      rows_gradient_zW = exchange.all_to_all(travelling_zW, 0, 0)
      table_gradient_iW = table_gradient_iW.at[wanted].add(
        rows_gradient_zW.astype(table_iW.dtype)
      )
    return table_gradient_iW, x_gradient

  zeros_iW = jnp.zeros_like(table_iW) if is_float else None
  table_gradient_iW, x_gradient = planned.over_rounds(
    add, (zeros_iW, jnp.zeros(x.shape, jnp.float32))
  )
  return table_gradient_iW, None, x_gradient.astype(x.dtype)


_sum_over_rounds.defvjp(_forward, _backward)


def _rows(exchange: Exchange, table_iW, wanted):
  """Exchanges the wanted rows; casts rows or table, whichever is smaller."""
  dtype = _travel_dtype(exchange, table_iW)
  if wanted.size > table_iW.shape[0]:
    return exchange.all_to_all(table_iW.astype(dtype)[wanted], 0, 0)
  return exchange.all_to_all(table_iW[wanted].astype(dtype), 0, 0)


def _travel_dtype(exchange: Exchange, table_iW):
  """Returns the dtype in which rows travel: integers as they are stored."""
  is_float = jnp.issubdtype(table_iW.dtype, jnp.floating)
  return exchange.dtype if is_float else table_iW.dtype
