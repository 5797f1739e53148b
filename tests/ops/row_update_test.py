"""Tests of the row-wise update of a table from its gradient in factors."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from ultramem_jax.ops import chunks, precision, row_update
from ultramem_jax.ops.cpu import sort as row_order
from ultramem_jax.testing import assert_close

ADAMW = row_update.AdamW(0.9, 0.95, 1e-8, 0.1, 0.01, 3)


def make(num_rows, tokens, reads, cores=2, num_pools=4, width=6, seed=0):
  """A table and factors; many reads of few rows."""
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  variance_IW = np.square(rng.normal(size=(num_rows, width)))
  table = row_update.Table(
    normal(num_rows, width),
    normal(num_rows, width),
    jnp.asarray(variance_IW, jnp.float32),
  )
  # Squaring makes low rows far likelier.
  row_TY = (num_rows * rng.random((tokens, reads)) ** 2).astype(np.int32)
  factors = row_update.Factors(
    jnp.asarray(row_TY),
    jnp.asarray(rng.integers(0, num_pools, (tokens, reads)), jnp.int32),
    normal(tokens, reads, cores),
    normal(tokens, num_pools, width),
  )
  return table, factors


def dense_gradient(factors, num_rows):
  """The gradient from the definition, one read after the other."""
  row_TY, pool_TY, weight_TYC, vector_TEW = map(np.asarray, factors)
  num_cores, width = weight_TYC.shape[-1], vector_TEW.shape[-1]
  gradient_IW = np.zeros((num_rows, width))
  for t, k in np.ndindex(row_TY.shape):
    for w in range(width):
      gradient_IW[row_TY[t, k], w] += (
        weight_TYC[t, k, w // (width // num_cores)]
        * vector_TEW[t, pool_TY[t, k], w]
      )
  return gradient_IW


@functools.partial(jax.jit, static_argnums=(0, 1))
def row_gradients(budget, num_rows, factors):
  """The dense gradient, of what `_scan_rows` gives; rows never twice."""

  def put(dense, row_z, gradient_zW):
    gradient_IW, count_I = dense
    return (
      gradient_IW.at[row_z].set(gradient_zW, mode="drop"),
      count_I.at[row_z].add(1, mode="drop"),
    )

  dense = (
    jnp.zeros((num_rows, factors.vector_TEW.shape[-1])),
    jnp.zeros(num_rows, jnp.int32),
  )
  reads = row_order.sort_by_row(factors.row_TY, num_rows)
  return row_update._scan_rows(put, num_rows, budget, dense, factors, reads)


# Chunks of 1, 5 and 64 reads, all at once, and the products of accelerators.
BUDGETS = [24, 5 * 24, 64 * 24, 2**21, chunks.ACCELERATOR_CHUNK_BYTES]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
  "shape", [(7, 50, 8), (1, 30, 3), (1000, 3, 5), (5, 1, 1)], ids=str
)
def test_row_gradients_equal_the_definition(budget, shape):
  _, factors = make(*shape)
  gradient_IW, count_I = row_gradients(budget, shape[0], factors)
  assert_close(gradient_IW, dense_gradient(factors, shape[0]))
  read_I = np.bincount(factors.row_TY.ravel(), minlength=shape[0]) > 0
  np.testing.assert_array_equal(count_I, read_I)


def test_products_in_several_chunks_equal_the_definition(monkeypatch):
  # Chunks of 128 reads, which runs cross.
  monkeypatch.setattr(chunks, "ACCELERATOR_CHUNK_BYTES", 127 * 24)
  _, factors = make(9, 60, 11, seed=1)
  gradient_IW, _ = row_gradients(127 * 24, 9, factors)
  assert_close(gradient_IW, dense_gradient(factors, 9))


def test_squared_norm_is_that_of_the_sums():
  _, factors = make(7, 50, 8)
  reads = row_order.sort_by_row(factors.row_TY, 7)
  expected = np.square(dense_gradient(factors, 7)).sum()
  squares = jax.jit(row_update.squared_norm, static_argnums=2)(
    factors, reads, 7
  )
  np.testing.assert_allclose(squares, expected, rtol=1e-5)


def update(table, factors, scale=1.0, adamw=ADAMW, key=0):
  reads = row_order.sort_by_row(factors.row_TY, table.values_IW.shape[0])
  return row_update.update_rows(
    table, factors, reads, scale, adamw, jnp.uint32(key)
  )


jitted_update = jax.jit(update)
update_reference = jax.jit(row_update.update_rows_reference)


def was_read(factors, num_rows):
  return np.bincount(factors.row_TY.ravel(), minlength=num_rows) > 0


@pytest.mark.parametrize("per_row", [False, True], ids=["element", "row"])
@pytest.mark.parametrize("shape", [(7, 50, 8), (3000, 50, 8)], ids=str)
def test_update_equals_the_reference(shape, per_row):
  table, factors = make(*shape)
  if per_row:
    table = table._replace(nu=table.nu.mean(1))
  updated = jitted_update(table, factors, 0.5)
  assert_close(updated, update_reference(table, factors, 0.5, ADAMW))
  for new, old in zip(*map(jax.tree.leaves, (updated, table)), strict=True):
    changed_I = np.asarray(new != old).reshape(shape[0], -1).any(1)
    np.testing.assert_array_equal(changed_I, was_read(factors, shape[0]))


def test_steps_equal_those_of_adamw():
  table, factors = make(5, 60, 8)
  zeros_IW = jnp.zeros_like(table.mu_IW)
  table = table._replace(mu_IW=zeros_IW, nu=zeros_IW)
  assert was_read(factors, 5).all()
  optimizer = optax.adamw(0.01, 0.9, 0.95, 1e-8, weight_decay=0.1)
  values_IW = table.values_IW
  state = optimizer.init(values_IW)
  optimize = jax.jit(optimizer.update)
  for step in range(1, 5):
    vector_TEW = factors.vector_TEW * step**2
    factors = factors._replace(vector_TEW=vector_TEW)
    table = jitted_update(table, factors, adamw=ADAMW._replace(step=step))
    gradient_IW = jnp.asarray(dense_gradient(factors, 5), jnp.float32)
    change_IW, state = optimize(gradient_IW, state, values_IW)
    values_IW = optax.apply_updates(values_IW, change_IW)
  assert_close(table.values_IW, values_IW)


@jax.jit
def low_precision(table):
  return jax.tree.map(lambda x: precision.encode(x, jnp.uint16), table)


@jax.jit
def decode(table):
  return jax.tree.map(precision.decode, table)


def test_bfloat16_is_rounded_up_or_down_with_the_right_chances():
  table, factors = make(40, 50, 8)
  table = low_precision(table)
  exact = update_reference(decode(table), factors, 1.0, ADAMW)
  several = jax.jit(jax.vmap(lambda key: update(table, factors, key=key)))(
    jnp.arange(400)
  )
  several, exact, table = map(
    jax.tree.leaves, jax.device_get((decode(several), exact, decode(table)))
  )
  for rounded, expected, old in zip(several, exact, table, strict=True):
    # Half a bit of 8, the whole bit where it lies between two numbers.
    assert (abs(rounded - expected) <= 2**-7 * abs(expected)).all()
    assert_close(rounded.mean(0), expected, tolerance=1e-3)
    read_I = was_read(factors, 40)
    np.testing.assert_array_equal(
      rounded[:, ~read_I], old[None][:, ~read_I].repeat(400, 0)
    )
  # What the three arrays of a table are rounded by is not the same, nor is
  # it the same in two rows or columns.
  up = [
    np.asarray(rounded > expected, np.float64)[:, was_read(factors, 40)]
    for rounded, expected in zip(several, exact, strict=True)
  ]
  samples = np.stack([u.reshape(400, -1)[:, :60] for u in up], 1)
  samples = samples.reshape(400, -1)
  samples = samples[:, samples.std(0) > 0.3]
  correlation = np.corrcoef(samples.T)
  np.fill_diagonal(correlation, 0)
  assert abs(correlation).max() < 0.25  # 5 standard deviations of 1 / 20


def test_rounding_depends_on_key_and_row_alone():
  table, factors = make(40, 50, 8)
  table = low_precision(table)
  once, again, other = (
    jitted_update(table, factors, key=key) for key in (1, 1, 2)
  )
  # The same rows among other reads: their order changes, their sums do not.
  f = factors
  extra = [x[-1:] for x in f]
  extra[2] = jnp.zeros_like(extra[2])
  more = row_update.Factors(
    *(jnp.concatenate([e, x]) for e, x in zip(extra, f, strict=True))
  )
  longer = jitted_update(table, more, key=1)
  results = map(jax.tree.leaves, (once, again, other, longer))
  for a, b, c, d in zip(*results, strict=True):
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()
    assert (a == d).mean() > 0.99  # sums may differ by their rounding


def instructions(compiled):
  """Instructions of a compiled program: [(dtype[shape], opcode)]."""
  return re.findall(r"= (\w+\[[\d,]*\])\S* ([\w-]+)\(", compiled.as_text())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_update_touches_no_array_as_large_as_the_table(dtype):
  num_rows, width = 20_000, 16
  shapes = jax.eval_shape(lambda: make(num_rows, 40, 8, width=width))
  table, factors = shapes
  if dtype == "bfloat16":
    table = jax.eval_shape(low_precision, table)
  compiled = jax.jit(update, donate_argnums=0).lower(table, factors).compile()
  stored = {"float32": "f32", "bfloat16": "u16"}[dtype]
  of_table = {
    opcode
    for array, opcode in instructions(compiled)
    if array.endswith(f"[{num_rows},{width}]")
    and not (
      array.startswith(stored)
      and opcode
      in (
        "parameter",
        "get-tuple-element",
        "scatter",
        "dynamic-update-slice",
        "fusion",
        "bitcast",
        "while",
      )
    )
  }
  assert not of_table
  assert compiled.memory_analysis().temp_size_in_bytes < num_rows * width


def test_sgd_moves_the_rows_read_against_their_gradients():
  (values_IW, *_), factors = make(40, 20, 3)
  table = row_update.Table(values_IW, None, None)
  updated = jitted_update(table, factors, 0.5, row_update.Sgd(0.1, 0.2, 3))
  assert updated[1:] == (None, None)
  descent_IW = 0.1 * values_IW + 0.5 * dense_gradient(factors, 40)
  read_I1 = was_read(factors, 40)[:, None]
  assert 0 < read_I1.mean() < 1
  assert_close(updated.values_IW, values_IW - 0.2 * read_I1 * descent_IW)
