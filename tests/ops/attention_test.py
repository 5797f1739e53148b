"""Attention in blocks against attention at once, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import attention
from ultramem_jax.testing import assert_close


def inputs(length, dtype=jnp.float32, heads=3, kv_heads=3):
  """Queries, keys, values, documents, and a gradient of the result."""
  rng = np.random.default_rng(0)
  draw = lambda heads: jnp.asarray(
    rng.normal(size=(2, length, heads, 4)), dtype
  )
  # Three documents, and padding at the end of the second row.
  segment_BT = np.repeat(np.arange(1, 4), -(-length // 3))[None, :length]
  segment_BT = np.repeat(segment_BT, 2, axis=0)
  segment_BT[1, -length // 4 :] = 0
  segment_BT = jnp.asarray(segment_BT, jnp.int32)
  return (*map(draw, (heads, kv_heads, kv_heads)), segment_BT, draw(heads))


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, query, key, value, segment_BT, gradient):
  y, pullback = jax.vjp(lambda *x: function(*x, segment_BT), query, key, value)
  return y, pullback(gradient)


# One block, four of one size, and a last one that is shorter; windows within a
# block, and over several.
@pytest.mark.parametrize("length", [6, 256, 270])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
  "heads, kv_heads, window", [(3, 3, 0), (6, 2, 0), (4, 1, 100), (2, 2, 3)]
)
def test_blocks_equal_all_at_once(length, dtype, heads, kv_heads, window):
  given = inputs(length, dtype, heads, kv_heads)
  in_blocks = functools.partial(attention.attend, window=window)
  at_once = functools.partial(attention._attend_at_once, "xla", window)
  assert_close(
    value_and_gradients(in_blocks, *given),
    value_and_gradients(at_once, *given),
    jnp.dtype(dtype).name,
  )


@pytest.mark.parametrize("kv_heads, window", [(4, 0), (2, 0), (1, 2)])
def test_equals_its_definition(kv_heads, window):
  """Head h of the queries reads head h // (heads / kv_heads) of the keys."""
  given = inputs(6, heads=4, kv_heads=kv_heads)[:4]
  query, key, value, segment_BT = map(np.asarray, given)
  key, value = (np.repeat(x, 4 // kv_heads, axis=2) for x in (key, value))
  score_BQTS = np.einsum("BTQH,BSQH->BQTS", query, key) / 4**0.5
  allowed_BTS = np.tril(np.ones((6, 6), bool)) & (
    segment_BT[:, :, None] == segment_BT[:, None]
  )
  if window:
    allowed_BTS &= np.triu(np.ones((6, 6), bool), 1 - window)
  weight_BQTS = np.exp(score_BQTS) * allowed_BTS[:, None]
  weight_BQTS /= weight_BQTS.sum(-1, keepdims=True)
  expected = np.einsum("BQTS,BSQH->BTQH", weight_BQTS, value)
  assert_close(attention.attend(*given, window=window), expected)


def test_a_window_leaves_keys_out_of_its_blocks():
  """Of 256 positions in blocks of 64: each reads two before its own."""
  query, key, value, segment_BT, _ = inputs(256)
  text = str(
    jax.make_jaxpr(functools.partial(attention._attend_in_blocks, 3))(
      query, key, value, segment_BT
    )
  )
  assert "2,3,1,64,66]" in text and "2,3,1,64,256]" not in text


def test_large_scores_do_not_overflow():
  """Scores of hundreds, whose exponentials float32 does not hold."""
  query, *rest = inputs(6)
  y = attention.attend(300 * query, *rest[:3])
  assert_close(y, attention._attend_at_once("xla", 0, 300 * query, *rest[:3]))


def test_a_loud_position_of_another_document_hides_nothing():
  """The first position, which scores 1e4 more."""
  query, key, value, _, _ = inputs(6)
  segment_BT = jnp.array([[1, 2, 2, 2, 2, 2]] * 2)
  loud = key.at[:, 0].set(1e4 * jnp.sign(query[:, 3]))
  attend = lambda key: attention.attend(query, key, value, segment_BT)[:, 1:]
  np.testing.assert_array_equal(attend(loud), attend(key))


def test_no_scores_are_kept_for_the_gradient():
  """Only what is as large as the inputs, and a bias that all heads share."""
  query, key, value, segment_BT, _ = inputs(256)
  y, pullback = jax.vjp(
    lambda *x: attention._attend_in_blocks(0, *x, segment_BT), query, key, value
  )
  sizes = [x.size for x in jax.tree.leaves(pullback)]
  assert max(sizes) <= 2 * 256 * 256 and sum(x > y.size for x in sizes) == 1
