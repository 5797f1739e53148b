"""The lookup: the fast form against the slow one, values and gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from ultramem_jax.ops import chunks, lookup
from ultramem_jax.testing import assert_close

B, T, Y, W = 2, 5, 6, 8
ROWS = 14


def random_inputs(expansion=4, cores=2, seed=0):
  """table [I, W], index [B, T, Y] in [0, E * I), score [B, T, Y, C]."""
  random = np.random.default_rng(seed)
  table_IW = random.normal(size=(ROWS, W)).astype(np.float32)
  index_BTY = random.integers(expansion * ROWS, size=(B, T, Y), dtype=np.int32)
  # A row read twice by one token, in one pool and, if there are more, in two.
  index_BTY[..., 1] = index_BTY[..., 0]
  index_BTY[..., 2] = (index_BTY[..., 0] + ROWS) % (expansion * ROWS)
  score_BTYC = random.normal(size=(B, T, Y, cores)).astype(np.float32)
  return table_IW, index_BTY, score_BTYC


def value_and_gradient(function, inputs, expansion):
  table_IW, index_BTY, score_BTYC = inputs
  cotangent_BTEW = (
    np.random.default_rng(1)
    .normal(size=(*index_BTY.shape[:2], expansion, W))
    .astype(np.float32)
  )

  def loss(table_IW, score_BTYC):
    pooled_BTEW = function(table_IW, index_BTY, score_BTYC, expansion)
    return (pooled_BTEW * cotangent_BTEW).sum(), pooled_BTEW

  gradient, value = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(
    table_IW, score_BTYC
  )
  return value, gradient


def test_by_hand():
  """Two rows of width 2, two pools, two cores; a duplicate in pool 1."""
  table_IW = jnp.array([[1.0, 10.0], [2.0, 20.0]])
  index_BTY = jnp.array([[[0, 3, 3]]])  # row 0 of pool 0, row 1 of pool 1
  score_BTYC = jnp.array([[[[1.0, 2.0], [3.0, 4.0], [0.5, -1.0]]]])
  pooled_BTEW = lookup.pool_rows(table_IW, index_BTY, score_BTYC, 2)
  np.testing.assert_array_equal(pooled_BTEW, [[[[1, 20], [7, 60]]]])


@pytest.mark.parametrize(
  ("expansion", "cores"), [*itertools.product((1, 4, 9), (1, 2))]
)
def test_fast_is_reference(expansion, cores, platform, monkeypatch):
  """Five positions in chunks of two, the last one padded."""
  inputs = random_inputs(expansion, cores)
  expected = value_and_gradient(lookup.pool_rows_reference, inputs, expansion)
  monkeypatch.setattr(chunks, "chunk_length", lambda *args: 2)
  actual = value_and_gradient(lookup.pool_rows, inputs, expansion)
  assert actual[0].shape == (B, T, expansion, W)
  assert actual[0].dtype == jnp.float32
  assert_close(actual, expected)


def test_number_of_chunks_does_not_matter(monkeypatch):
  inputs = random_inputs()
  expected = value_and_gradient(lookup.pool_rows_reference, inputs, 4)
  # Chunks of 1, some, and all positions.
  for budget in (0, B * 4 * Y * W * 3, 2**30):
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", budget)
    assert_close(value_and_gradient(lookup.pool_rows, inputs, 4), expected)


def test_gradient_is_the_derivative():
  table_IW, index_BTY, score_BTYC = random_inputs()
  # Bilinear: central differences err by float32 rounding over eps only.
  pool = lambda table, score: lookup.pool_rows(table, index_BTY, score, 4)
  check_grads(
    jax.jit(pool),
    (table_IW, score_BTYC),
    1,
    modes=["rev"],
    atol=1e-2,
    rtol=1e-2,
    eps=0.1,
  )


def test_rows_never_read_have_no_gradient(monkeypatch):
  monkeypatch.setattr(chunks, "chunk_length", lambda *args: 2)
  table_IW, index_BTY, score_BTYC = random_inputs()
  index_BTY = index_BTY // 2 * 2 + 1  # odd rows
  _, (gradient_IW, _) = value_and_gradient(
    lookup.pool_rows, (table_IW, index_BTY, score_BTYC), 4
  )
  # Padding reads row 0, with score 0.
  np.testing.assert_array_equal(
    np.flatnonzero(gradient_IW.any(-1)), np.unique(index_BTY % ROWS)
  )


def test_bfloat16_table():
  """Rows are rounded, sums are not; the table's gradient has its dtype."""
  table_IW, *rest = random_inputs()
  table_IW = jnp.bfloat16(table_IW)
  value, gradient = value_and_gradient(lookup.pool_rows, (table_IW, *rest), 4)
  assert value.dtype == jnp.float32
  assert gradient[0].dtype == jnp.bfloat16
  expected, expected_gradient = value_and_gradient(
    lookup.pool_rows_reference, (jnp.float32(table_IW), *rest), 4
  )
  assert_close(value, expected)
  assert_close(gradient, expected_gradient, "bfloat16")


@pytest.mark.parametrize("dtype", ["uint16", "int8"])
def test_integer_tables(dtype):
  """Read like the float32 table of the same numbers; no gradient."""
  table_IW, *rest = random_inputs()
  if dtype == "uint16":
    half_IW = jnp.bfloat16(table_IW)
    stored_IW = jax.lax.bitcast_convert_type(half_IW, jnp.uint16)
    float_IW = jnp.float32(half_IW)
  else:
    float_IW = np.round(127 * table_IW / abs(table_IW).max())
    stored_IW = jnp.int8(float_IW)

  def loss(table_IW, index_BTY, score_BTYC):
    pooled_BTEW = lookup.pool_rows(table_IW, index_BTY, score_BTYC, 4)
    dot_BTY = lookup.dot_rows(table_IW, index_BTY % ROWS, pooled_BTEW[:, :, 0])
    return dot_BTY.sum()

  gradient = jax.jit(jax.value_and_grad(loss, (0, 2), allow_int=True))
  value, (table_gradient, score_gradient) = gradient(stored_IW, *rest)
  expected, (_, expected_score_gradient) = gradient(float_IW, *rest)
  assert table_gradient.dtype == jax.dtypes.float0
  assert_close(value, expected)
  assert_close(score_gradient, expected_score_gradient)


@pytest.mark.parametrize("dtype", ["float32", "uint16", "int8"])
@pytest.mark.parametrize("function", ["pool_rows", "dot_rows"])
def test_nothing_of_the_size_of_the_table(function, dtype):
  """Forward and backward, where the table is not differentiated."""
  width, rows = 8, 2**20

  def loss(table_IW, index_BTY, x):
    function_ = getattr(lookup, function)
    return (function_(table_IW, index_BTY, x) ** 2).sum()

  x_shape = (1, 4, 6, 2) if function == "pool_rows" else (1, 4, width)
  compiled = (
    jax.jit(jax.grad(loss, 2))
    .lower(
      jax.ShapeDtypeStruct((rows, width), dtype),
      jax.ShapeDtypeStruct((1, 4, 6), jnp.int32),
      jax.ShapeDtypeStruct(x_shape, jnp.float32),
    )
    .compile()
  )
  assert compiled.memory_analysis().temp_size_in_bytes < rows


def test_temporaries_do_not_hold_all_rows():
  """Memory of forward and backward must not grow like T * Y * W."""
  width, reads = 128, 32

  def temporary_bytes(length):
    shapes = (
      jax.ShapeDtypeStruct((ROWS, width), jnp.float32),
      jax.ShapeDtypeStruct((1, length, reads), jnp.int32),
      jax.ShapeDtypeStruct((1, length, reads, 2), jnp.float32),
    )

    def loss(table_IW, index_BTY, score_BTYC):
      return (lookup.pool_rows(table_IW, index_BTY, score_BTYC, 4) ** 2).sum()

    compiled = jax.jit(jax.grad(loss, (0, 2))).lower(*shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes

  grown = temporary_bytes(4096) - temporary_bytes(1024)
  # Per position: the pooled vectors and their gradients, 4 E W bytes each, and
  # a little per read. All rows are 16384 bytes, the reference holds them five
  # times.
  assert grown / (4096 - 1024) < 3 * 4 * 4 * width


@pytest.mark.parametrize("chunk_bytes", [1, 2**21])
def test_dot_rows_is_its_reference(chunk_bytes, monkeypatch):
  monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", chunk_bytes)
  random = np.random.default_rng(0)
  table_IW = random.normal(size=(9, 6)).astype(np.float32)
  index_BTY = random.integers(9, size=(B, T, Y), dtype=np.int32)
  index_BTY[..., 1] = index_BTY[..., 0]  # a row read twice
  x_BTW = random.normal(size=(B, T, 6)).astype(np.float32)
  cotangent_BTY = random.normal(size=(B, T, Y)).astype(np.float32)

  def value_and_gradient(function):
    def loss(table_IW, x_BTW):
      out_BTY = function(table_IW, index_BTY, x_BTW)
      return (out_BTY * cotangent_BTY).sum(), out_BTY

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(table_IW, x_BTW)

  assert_close(
    value_and_gradient(lookup.dot_rows),
    value_and_gradient(lookup.dot_rows_reference),
  )
  check_grads(
    jax.jit(lambda t, x: lookup.dot_rows(t, index_BTY, x)),
    (table_IW, x_BTW),
    1,
    modes=["rev"],
    rtol=1e-2,
  )


def test_dot_rows_by_hand():
  table_IW = jnp.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
  out_BTY = lookup.dot_rows(
    table_IW, jnp.array([[[2, 0]]]), jnp.array([[[10.0, 1.0]]])
  )
  np.testing.assert_array_equal(out_BTY, [[[56, 12]]])
