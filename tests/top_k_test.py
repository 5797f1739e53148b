"""The m largest: the tournament against XLA's own top-k."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import top_k


@pytest.mark.parametrize(
    ("shape", "m"),
    [((3, 5, 60), 7), ((130, 64), 64), ((2, 13), 13), ((4, 1), 1), ((6, 7), 2)],
    ids=str,
)
def test_tournament_is_top_k(shape, m):
  """Many ties: scores are rounded."""
  scores = np.random.default_rng(0).normal(size=shape).astype(np.float32)
  scores = scores.round(1) + 0.0  # to XLA, -0.0 is less than 0.0
  expected = jax.lax.top_k(scores, m)[1]
  actual = jax.jit(top_k.tournament, static_argnums=1)(scores, m)
  assert actual.dtype == jnp.int32
  np.testing.assert_array_equal(actual, expected)


def test_scores_that_are_no_numbers_give_indices_in_range():
  scores = np.full((2, 12), np.nan, np.float32)
  scores[0, 3] = 1
  index = jax.jit(top_k.tournament, static_argnums=1)(scores, 4)
  assert (index >= 0).all() and (index < 12).all()


def test_many_rows_play_a_tournament_on_a_cpu(platform):
  """Few rows, and other platforms, take XLA's top-k."""

  def uses_top_k(rows):
    compiled = (
        jax.jit(lambda scores: top_k.top_m(scores, 8))
        .lower(jnp.zeros((rows, 64))).compile().as_text()
    )
    assert " sort(" not in compiled
    return "TopK" in compiled

  assert uses_top_k(4)
  assert uses_top_k(1000) == (platform == "accelerator")
