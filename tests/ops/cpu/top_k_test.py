"""The m largest: the sieve against XLA's own top-k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops.cpu import top_k

sieve = jax.jit(top_k.sieve, static_argnums=1)


@pytest.mark.parametrize(
  ("shape", "m"),
  [
    ((3, 5, 60), 7),
    ((130, 64), 64),
    ((2, 13), 13),
    ((4, 1), 1),
    ((6, 7), 2),
    ((9, 700), 5),
  ],
  ids=str,
)
@pytest.mark.parametrize("digits", [1, 7])
def test_sieve_is_top_k(shape, m, digits):
  """Rounded to one digit, many scores are equal."""
  scores = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  scores = scores.round(digits) + 0.0  # to XLA, -0.0 is less than 0.0
  actual = sieve(scores, m)
  assert actual.dtype == jnp.int32
  np.testing.assert_array_equal(actual, jax.lax.top_k(scores, m)[1])


def test_best_scores_in_few_groups():
  """Their maxima then give a threshold that far too many scores reach."""
  scores = np.random.default_rng(0).normal(size=(4, 400)).astype(np.float32)
  for column in range(3):
    scores[:, column::40] += 9
  scores[2, 50:350] = 20
  np.testing.assert_array_equal(sieve(scores, 8), jax.lax.top_k(scores, 8)[1])


def test_rows_of_one_score_take_the_first_indices():
  scores = np.random.default_rng(0).normal(size=(3, 90)).astype(np.float32)
  scores[1] = 2
  np.testing.assert_array_equal(sieve(scores, 6), jax.lax.top_k(scores, 6)[1])


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("num_scores", "m"), [(13, 13), (300, 8)])
def test_scores_whose_sum_overflows(num_scores, m, sign):
  random = np.random.default_rng(0)
  scores = sign * random.uniform(1.8e38, 3.3e38, size=(9, num_scores))
  scores = scores.astype(np.float32)
  np.testing.assert_array_equal(sieve(scores, m), jax.lax.top_k(scores, m)[1])


def test_scores_that_are_no_numbers_give_indices_in_range():
  scores = np.full((4, 12), np.nan, np.float32)
  scores[0, 3] = 1
  scores[2:] = np.arange(12)
  scores[2, ::2], scores[3, ::3] = np.inf, -np.inf
  index = sieve(scores, 4)
  assert (index >= 0).all() and (index < 12).all()


def test_many_rows_go_through_a_sieve_on_a_cpu(platform):
  """Few rows, and other platforms, take XLA's top-k."""

  def uses_sieve(rows):
    compiled = (
      jax.jit(lambda scores: top_k.top_m(scores, 8))
      .lower(jnp.zeros((rows, 64)))
      .compile()
      .as_text()
    )
    assert " sort(" not in compiled
    assert "TopK" in compiled
    return "popcnt" in compiled

  assert not uses_sieve(4)
  assert uses_sieve(1000) == (platform == "cpu")
