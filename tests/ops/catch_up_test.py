"""Tests of rows that make up for the steps that did not read them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ultramem_jax.ops import catch_up, row_update
from ultramem_jax.ops.cpu import sort as row_order
from ultramem_jax.testing import assert_close

BETAS = (0.9, 0.95)
EPS, DECAY, STEPS = 1e-3, 0.1, 700
RATE_S = 0.01 * (1 + np.sin(np.arange(STEPS + 1) / 20))


def make_past(betas=BETAS):
  return catch_up.make_past(
    *betas, EPS, DECAY, jnp.asarray(RATE_S, jnp.float32)
  )


def make_table(step_I, width=5, per_row=False):
  """Rows last updated at steps; second moments about as large as eps^2."""
  rng = np.random.default_rng(0)
  shape = (len(step_I), width)
  return row_update.Table(
    jnp.asarray(rng.normal(size=shape), jnp.float32),
    jnp.asarray(EPS * rng.normal(size=shape), jnp.float32),
    jnp.asarray(
      (EPS * rng.normal(size=shape[:1] if per_row else shape)) ** 2, jnp.float32
    ),
    jnp.asarray(step_I, jnp.int32),
  )


def moved(table, step, betas=BETAS):
  """The rows after a step, from the definition, one step after the other."""
  rows = []
  columns = (np.asarray(x, np.float64) for x in table)
  for x, m, v, last in zip(*columns, strict=True):
    for j in range(int(last) + 1, step + 1):
      m, v = betas[0] * m, betas[1] * v
      move = m / (1 - betas[0] ** j) / (np.sqrt(v / (1 - betas[1] ** j)) + EPS)
      x = (1 - RATE_S[j] * DECAY) * x - RATE_S[j] * move
    rows.append((x, m, v, step))
  return row_update.Table(*map(np.stack, zip(*rows, strict=True)))


# From the first step on; some rows up to date; more steps than momentum lasts.
@pytest.mark.parametrize(
  "step, betas",
  [
    *((step, BETAS) for step in (1, 9, 30, STEPS)),
    *(
      (step, betas)
      for step in (30, STEPS)
      for betas in ((0.0, 0.95), (0.5, 0.3))
    ),
  ],
  ids=str,
)
@pytest.mark.parametrize("per_row", [False, True], ids=["element", "row"])
def test_rows_are_where_single_steps_bring_them(step, betas, per_row):
  step_I = [s for s in (0, 1, 2, 7, 9, 29, 30, 400, STEPS) if s <= step]
  table = make_table(step_I, per_row=per_row)
  rows = jax.jit(catch_up.catch_up)(table, step, make_past(betas))
  # Up to 208 roundings to 2^-24, one after the other.
  assert_close(rows, moved(table, step, betas), tolerance=3e-6)
  assert catch_up.moves_that_count(*betas) < STEPS - 7


def test_catching_up_twice_is_catching_up_once():
  table, past = make_table([3, 5, 20]), make_past()
  twice = catch_up.catch_up(catch_up.catch_up(table, 21, past), 50, past)
  assert_close(twice, catch_up.catch_up(table, 50, past), tolerance=1e-6)
  same = catch_up.catch_up(twice, 50, past)
  for one, other in zip(same, twice, strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("block_bytes", [1, 60, 2**18])
def test_whole_table(block_bytes, monkeypatch):
  monkeypatch.setattr(catch_up, "BLOCK_BYTES", block_bytes)
  table = make_table(np.arange(11) % 5)
  assert_close(
    catch_up.all_rows(table, 12, make_past()), moved(table, 12), tolerance=1e-6
  )


@pytest.mark.parametrize("block_bytes", [1, 60, 2**18])
def test_rows_read(block_bytes, monkeypatch):
  monkeypatch.setattr(catch_up, "BLOCK_BYTES", block_bytes)
  table = make_table(np.arange(40) % 5)
  row_TK = np.random.default_rng(1).integers(0, 40, (6, 3))
  row_TK[0], row_TK[1] = 0, 39
  values_ZW, place_TK = catch_up.rows_read(
    table, jnp.asarray(row_TK, jnp.int32), 12, make_past()
  )
  assert_close(
    values_ZW[place_TK], moved(table, 12).values_IW[row_TK], tolerance=1e-6
  )
  assert place_TK.max() == len(np.unique(row_TK)) - 1


def test_ten_sparse_steps_equal_dense_adamw():
  """Random reads; every row is left out by some steps, one by all of them."""
  num_rows, width, steps = 12, 4, 10
  rng = np.random.default_rng(0)
  past = make_past()
  table = make_table(np.zeros(num_rows), width)
  table = table._replace(mean_IW=0 * table.mean_IW, variance=0 * table.variance)
  optimizer = optax.adamw(
    lambda count: jnp.asarray(RATE_S)[count + 1],
    *BETAS,
    EPS,
    weight_decay=DECAY,
  )
  dense_IW = table.values_IW
  state = optimizer.init(dense_IW)

  @jax.jit
  def sparse_step(table, factors, rate, step):
    adamw = row_update.AdamW(*BETAS, EPS, DECAY, rate, step, past)
    reads = row_order.sort_reads(factors.row_TK, num_rows)
    return row_update.update_rows(
      table, factors, reads, 1.0, adamw, jnp.uint32(0)
    )[0]

  @jax.jit
  def dense_step(dense_IW, factors, state):
    gradient_IW = (
      jnp.zeros((num_rows, width))
      .at[factors.row_TK]
      .add(factors.weight_TKC * factors.vector_TEW)
    )
    change_IW, state = optimizer.update(gradient_IW, state, dense_IW)
    return optax.apply_updates(dense_IW, change_IW), state

  rows_read = jax.jit(catch_up.rows_read)
  for step in range(1, steps + 1):
    row_TK = rng.integers(0, num_rows - 1, (2, 2)).astype(np.int32)
    # What is read is what dense AdamW has there.
    values_ZW, place_TK = rows_read(table, row_TK, step - 1, past)
    assert_close(values_ZW[place_TK], dense_IW[row_TK], tolerance=1e-6)
    factors = row_update.Factors(
      jnp.asarray(row_TK),
      jnp.zeros((2, 2), jnp.int32),
      jnp.asarray(rng.normal(size=(2, 2, 1)), jnp.float32),
      jnp.asarray(rng.normal(size=(2, 1, width)), jnp.float32),
    )
    table = sparse_step(table, factors, np.float32(RATE_S[step]), step)
    dense_IW, state = dense_step(dense_IW, factors, state)
  behind_I = np.asarray(table.step_I) < steps
  assert behind_I.any() and table.step_I[-1] == 0
  table = catch_up.all_rows(table, steps, past)
  assert_close(table.values_IW, dense_IW, tolerance=1e-6)
  assert_close(table.mean_IW, state[0].mu, tolerance=1e-6)
  assert_close(table.variance, state[0].nu, tolerance=1e-6)
