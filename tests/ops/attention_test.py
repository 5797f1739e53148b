"""Attention in blocks against attention at once, and its gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import attention
from ultramem_jax.testing import assert_close


def inputs(length, dtype=jnp.float32):
  """Queries, keys, values, documents, and a gradient of the result."""
  rng = np.random.default_rng(0)
  draw = lambda: jnp.asarray(rng.normal(size=(2, length, 3, 4)), dtype)
  # Three documents, and padding at the end of the second row.
  segment_BT = np.repeat(np.arange(1, 4), -(-length // 3))[None, :length]
  segment_BT = np.repeat(segment_BT, 2, axis=0)
  segment_BT[1, -length // 4 :] = 0
  return draw(), draw(), draw(), jnp.asarray(segment_BT, jnp.int32), draw()


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(function, query, key, value, segment_BT, gradient):
  y, pullback = jax.vjp(lambda *x: function(*x, segment_BT), query, key, value)
  return y, pullback(gradient)


# One block, four of one size, and a last one that is shorter.
@pytest.mark.parametrize("length", [6, 256, 270])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_blocks_equal_all_at_once(length, dtype):
  given = inputs(length, dtype)
  assert_close(
    value_and_gradients(attention.attend, *given),
    value_and_gradients(
      functools.partial(attention._attend_at_once, "xla"), *given
    ),
    jnp.dtype(dtype).name,
  )


def test_equals_its_definition():
  query, key, value, segment_BT, _ = map(np.asarray, inputs(6))
  score_BQTS = np.einsum("BTQH,BSQH->BQTS", query, key) / 4**0.5
  allowed_BTS = np.tril(np.ones((6, 6), bool)) & (
    segment_BT[:, :, None] == segment_BT[:, None]
  )
  weight_BQTS = np.exp(score_BQTS) * allowed_BTS[:, None]
  weight_BQTS /= weight_BQTS.sum(-1, keepdims=True)
  expected = np.einsum("BQTS,BSQH->BTQH", weight_BQTS, value)
  assert_close(attention.attend(query, key, value, segment_BT), expected)


def test_large_scores_do_not_overflow():
  """Scores of hundreds, whose exponentials float32 does not hold."""
  query, *rest = inputs(6)
  y = attention.attend(300 * query, *rest[:3])
  assert_close(y, attention._attend_at_once("xla", 300 * query, *rest[:3]))


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
    lambda *x: attention._attend_in_blocks(*x, segment_BT), query, key, value
  )
  sizes = [x.size for x in jax.tree.leaves(pullback)]
  assert max(sizes) <= 2 * 256 * 256 and sum(x > y.size for x in sizes) == 1
