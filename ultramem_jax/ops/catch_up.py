"""Catching up: what AdamW does to the rows of a table that no step reads.

A dense update moves every row at every step. One whose gradient is 0 decays,
goes on by what is left of its momentum, and its moments fade; with the rate
lr_j of step j,

  m <- beta1 m,    v <- beta2 v,
  x <- (1 - lr_j decay) x
       - lr_j m / (1 - beta1^j) / (sqrt(v / (1 - beta2^j)) + eps)

None of this depends on what else the run does. So a sparse update may leave a
row behind, with the step at which it was last up to date, and make up for the
steps between when the row is next read: before it is looked up, and again when
it is updated. The model then reads what a dense update would have left there.

Decay and moments have a closed form. The sum of the moves has none, because of
eps: they are made one after the other, until one is below the last bit of the
first (after 208 steps with betas of 0.9 and 0.95, a move being beta1 /
sqrt(beta2) of the one before). So a read costs as many moves as steps left the
row out, and at most those.

Z counts reads; P those of a block.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from ultramem_jax.ops import blocks
from ultramem_jax.ops.cpu.sort import sort_reads

# Moves in one pass over a block of rows, which then stays in registers; and
# the bytes of a block, which is passed over until all its rows are there.
MOVES = 8
BLOCK_BYTES = 2**18


class Past(struct.PyTreeNode):
  """AdamW over a run: of step j, the element j of each array; of none, 0.

  push_S: lr / (1 - beta1^j).
  spread_S: 1 / sqrt(1 - beta2^j).
  keep_S: 1 - lr decay.
  kept_S: the sum of log keep up to j.
  """

  beta1: float = struct.field(pytree_node=False)
  beta2: float = struct.field(pytree_node=False)
  eps: float = struct.field(pytree_node=False)
  push_S: jax.Array
  spread_S: jax.Array
  keep_S: jax.Array
  kept_S: jax.Array


def make_past(beta1, beta2, eps, weight_decay, rate_S) -> Past:
  """The past of a run whose rate at step j is rate_S[j], from j = 1 on."""
  step_S = jnp.arange(1, rate_S.size, dtype=jnp.float32)
  rate_S = rate_S[1:]

  def with_none(nothing, x_S):
    return jnp.concatenate([jnp.full(1, nothing, jnp.float32), x_S])

  keep_S = 1 - rate_S * weight_decay
  return Past(
    beta1,
    beta2,
    eps,
    with_none(0, rate_S / (1 - beta1**step_S)),
    with_none(1, jax.lax.rsqrt(1 - beta2**step_S)),
    with_none(1, keep_S),
    with_none(0, jnp.cumsum(jnp.log(keep_S))),
  )


def catch_up(rows: Any, step, past: Past) -> Any:
  """Rows as they are after a step, none of the steps since having read them.

  Args:
    rows: a float32 `row_update.Table` of some rows, P of them.
    step: int32 scalar, at least every step_I.
    past: the run's.
  Returns:
    The same; every step_I is step.
  """
  start_P = rows.step_I
  missed_P = step - start_P
  root = jnp.sqrt(rows.variance)
  root = root if root.ndim == 2 else root[:, None]

  def move(n, values_PW):
    for k in range(MOVES):
      count = n * MOVES + k + 1
      at_P = jnp.where(count <= missed_P, start_P + count, 0)
      push_P = past.push_S[at_P] * past.beta1 ** jnp.float32(count)
      spread_P = past.spread_S[at_P] * past.beta2 ** (jnp.float32(count) / 2)
      values_PW = past.keep_S[at_P][:, None] * values_PW - (
        push_P[:, None] * rows.mean_IW / (spread_P[:, None] * root + past.eps)
      )
    return values_PW

  passes = math.ceil(moves_that_count(past.beta1, past.beta2) / MOVES)
  passes = jnp.minimum(passes, (missed_P.max() + MOVES - 1) // MOVES)
  values_PW = jax.lax.fori_loop(0, passes, move, rows.values_IW)
  moved_P = start_P + jnp.minimum(missed_P, MOVES * passes)
  kept_P = jnp.exp(past.kept_S[step] - past.kept_S[moved_P])
  faded1_P, faded2_P = (
    beta ** missed_P.astype(jnp.float32) for beta in (past.beta1, past.beta2)
  )
  return rows._replace(
    values_IW=kept_P[:, None] * values_PW,
    mean_IW=faded1_P[:, None] * rows.mean_IW,
    variance=rows.variance
    * (faded2_P[:, None] if rows.variance.ndim == 2 else faded2_P),
    step_I=jnp.full_like(start_P, step),
  )


def moves_that_count(beta1: float, beta2: float) -> int:
  """Steps after which a row's momentum no longer moves it.

  Needs beta1^2 < beta2: moves would grow otherwise, as v fades before m.
  """
  if not beta1:
    return 1
  return math.ceil(math.log(2**-24) / math.log(beta1 / math.sqrt(beta2)))


def rows_read(table: Any, row_TK, step, past: Past):
  """The rows of some reads, caught up, in an array of their own.

  Args:
    table: a `row_update.Table`, which is only read.
    row_TK: int32 of any shape, in [0, I).
    step, past: as for `catch_up`.
  Returns:
    (values_ZW, place_TK): as many rows as reads, of which the first are the
    distinct ones in order; and where in it the row of each read is.
  """
  num_rows, width = table.values_IW.shape
  row_Z, read_Z = sort_reads(row_TK, num_rows)
  place_Z = jnp.cumsum(row_Z != jnp.roll(row_Z, 1).at[0].set(row_Z[0]))
  place_TK = jnp.zeros_like(row_Z).at[read_Z].set(place_Z).reshape(row_TK.shape)
  distinct_Z = jnp.full_like(row_Z, row_Z[-1]).at[place_Z].set(row_Z)

  def block(row_P):
    rows_P = jax.tree.map(lambda x: jnp.take(x, row_P, axis=0), table)
    return catch_up(rows_P, step, past).values_IW

  length = _block_rows(row_Z.size, width)
  padding = -row_Z.size % length
  distinct_Z = jnp.pad(distinct_Z, (0, padding), mode="edge")
  values_ZW = jax.lax.map(block, distinct_Z.reshape(-1, length))
  return values_ZW.reshape(-1, width), place_TK


def all_rows(table: Any, step, past: Past) -> Any:
  """A whole table caught up, in place where it is donated."""
  num_rows, width = table.values_IW.shape
  length = _block_rows(num_rows, width)

  def block(n, table):
    # The last one overlaps the one before; what has caught up stays.
    start = jnp.minimum(n * length, num_rows - length)
    rows_P = jax.tree.map(
      lambda x: jax.lax.dynamic_slice_in_dim(x, start, length), table
    )
    return jax.tree.map(
      lambda x, rows: jax.lax.dynamic_update_slice_in_dim(
        x, rows, start, axis=0
      ),
      table,
      catch_up(rows_P, step, past),
    )

  return jax.lax.fori_loop(0, math.ceil(num_rows / length), block, table)


def _block_rows(rows: int, width: int) -> int:
  return blocks.block_length(BLOCK_BYTES, 1, rows, 4 * width)
