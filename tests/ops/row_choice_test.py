"""Tests of choosing the rows that are special to a batch."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import row_choice

NUM_ROWS = 40


def reference(row_TY, rarity_I, top_t, score):
  """Keeps the reads of the best rows; from the definition, row after row."""
  reads = [int(row) for row in row_TY.ravel() if row < len(rarity_I)]
  scores = []
  for row in sorted(set(reads)):
    share = reads.count(row) / len(reads)
    value = float(rarity_I[row])
    if score == "kl":
      value += np.log(share)
    scores.append((-share * value, row))
  chosen = [row for _, row in sorted(scores)[:top_t]]
  return np.where(np.isin(row_TY, chosen), row_TY, len(rarity_I))


def make_reads(seed=0, tokens=30, reads=7):
  """Reads of few rows often and of others once; some are padding."""
  rng = np.random.default_rng(seed)
  row_TY = (NUM_ROWS * rng.random((tokens, reads)) ** 3).astype(np.int32)
  row_TY[rng.random(tokens) < 0.2] = NUM_ROWS
  return row_TY, rng.gamma(2.0, 2.0, NUM_ROWS).astype(np.float32)


choose = jax.jit(row_choice.choose_rows, static_argnums=(2, 3))


@pytest.mark.parametrize("score", ["tfidf", "kl"])
@pytest.mark.parametrize("top_t", [1, 6, 1000])
def test_choice_equals_the_definition(top_t, score):
  row_TY, rarity_I = make_reads()
  chosen_TY = np.asarray(choose(row_TY, rarity_I, top_t, score))
  np.testing.assert_array_equal(
    chosen_TY, reference(row_TY, rarity_I, top_t, score)
  )
  kept = np.unique(chosen_TY[chosen_TY < NUM_ROWS])
  assert len(kept) == min(top_t, len(np.unique(row_TY[row_TY < NUM_ROWS])))


def test_scores_choose_what_they_are_for():
  """Read often here; common everywhere; and, by kl, no less so here."""
  row_TY = np.array([[0] * 6 + [1] * 3 + [2]], np.int32)
  rarity_I = np.array([0.1, 1.0, 2.0], np.float32)
  kept = lambda *args: set(np.asarray(choose(row_TY, *args)).ravel()) - {3}
  # 0.6 * 0.1, 0.3 * 1.0 and 0.1 * 2.0.
  assert kept(rarity_I, 1, "tfidf") == {1}
  assert kept(rarity_I, 2, "tfidf") == {1, 2}
  # Shares of 0.5, 0.4 and 0.1 in the background: 0.11, -0.09 and 0.
  background_I = -np.log(np.array([0.5, 0.4, 0.1], np.float32))
  assert kept(background_I, 2, "kl") == {0, 2}


@pytest.mark.parametrize("score", ["tfidf", "kl"])
def test_ties_go_to_the_lower_row(score):
  row_TY = np.array([[9, 4, 4, 9, 7, 7], [2, 2, 5, 30, 30, 11]], np.int32)
  rarity_I = np.full(NUM_ROWS, 1.5, np.float32)
  chosen_TY = choose(row_TY, rarity_I, 3, score)
  assert set(np.asarray(chosen_TY).ravel()) == {2, 4, 7, NUM_ROWS}


@pytest.mark.parametrize("score", ["tfidf", "kl"])
def test_rows_without_a_finite_rarity_are_never_chosen(score):
  row_TY, rarity_I = make_reads(2)
  rarity_I[: NUM_ROWS // 2] = -np.inf
  chosen_TY = np.asarray(choose(row_TY, rarity_I, 1000, score))
  np.testing.assert_array_equal(
    chosen_TY, np.where(row_TY < NUM_ROWS // 2, NUM_ROWS, row_TY)
  )


def test_padding_is_neither_chosen_nor_counted():
  row_TY, rarity_I = make_reads(1)
  padded_TY = np.concatenate([row_TY, np.full_like(row_TY, NUM_ROWS)])
  for score in ("tfidf", "kl"):
    np.testing.assert_array_equal(
      choose(padded_TY, rarity_I, 5, score)[: len(row_TY)],
      choose(row_TY, rarity_I, 5, score),
    )
  nothing_TY = np.full((3, 2), NUM_ROWS, np.int32)
  np.testing.assert_array_equal(
    choose(nothing_TY, rarity_I, 5, "kl"), nothing_TY
  )


@pytest.mark.parametrize("score", ["tfidf", "kl"])
def test_rarity_falls_with_the_counts(score):
  count_I = np.array([0, 1, 50, 2**40], np.int64)
  rarity = functools.partial(row_choice.rarity, count_I, score)
  total = int(count_I.sum())
  expected = {
    "tfidf": np.log((total + 1) / (count_I + 1)),
    "kl": -np.log((count_I + 1) / (total + 4)),
  }[score]
  rarity_I = rarity(total)
  assert rarity_I.dtype == np.float32 and (np.diff(rarity_I) < 0).all()
  np.testing.assert_allclose(rarity_I, expected, rtol=1e-6)
  assert jnp.isfinite(rarity(2 * total)).all()
