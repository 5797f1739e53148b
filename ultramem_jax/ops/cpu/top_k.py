"""The m largest of many scores, exact, in the form that suits the platform.

B counts rows of scores, n groups of a row's scores, O words of 32 marks, and m
the slots for scores of which M are kept.
"""

import functools
import math

import jax
import jax.numpy as jnp

# For fewer rows the sieve's fixed cost outweighs what it saves.
SIEVE_ROWS = 64
# Halvings of the range in which the threshold lies: first by the maxima of
# groups, then, at most, by all scores.
STEPS, MORE_STEPS = 8, 24
# Terms that one pass over a sum adds.
TERMS_PER_PASS = 4


def top_m(scores: jax.Array, m: int) -> jax.Array:
  """Returns the indices of the m largest scores along the last axis.

  Best first; of equal scores the lowest index comes first. Exact. Has no
  gradient.

  Args:
    scores: [..., N] float32, finite. (XLA sorts every other type in full on
      a CPU.) Of other scores the indices are arbitrary, and in range.
    m: at most N.
  Returns:
    [..., m] int32.
  """
  scores = jax.lax.stop_gradient(scores)
  if math.prod(scores.shape[:-1]) < SIEVE_ROWS:
    return by_xla(scores, m)
  return jax.lax.platform_dependent(
    scores,
    cpu=lambda scores: sieve(scores, m),
    default=lambda scores: by_xla(scores, m),
  )


def by_xla(scores: jax.Array, m: int) -> jax.Array:
  """Computes `top_m` by XLA's top-k: on a CPU slower, but compiled sooner."""
  # In two dimensions, because for more of them the TPU's compiler sorts in
  # full, although it has a top-k for more than about 64 m scores. The barrier
  # keeps XLA from merging a later slice into the top-k, which would make it a
  # full sort. It holds the index only: XLA for several devices aborts on a
  # barrier of both results.
  *leading, num_scores = scores.shape
  index = jax.lax.top_k(scores.reshape(-1, num_scores), m)[1]
  return jax.lax.optimization_barrier(index).reshape(*leading, m)


# Compiled into the program that calls it, but traced once for all calls of a
# shape: otherwise it would be most of the tracing of a model with memories.
@functools.partial(jax.jit, static_argnames="m")
def sieve(scores: jax.Array, m: int) -> jax.Array:
  """Computes `top_m` by a threshold that at least m scores reach, and few more.

  The m-th largest of the maxima of groups is such a threshold. The scores that
  reach it are moved together, into slots, and sorted by counting how many are
  better than each. All of this is loops of vector instructions over all rows,
  where XLA's own top-k on a CPU goes number by number, in one thread. That one
  is used where equal scores are too many for the slots.
  """
  *leading, num_scores = scores.shape
  scores_BN = scores.reshape(-1, num_scores)
  num_slots = _multiple_of_8(1.5 * m)
  marks_BO, marked_B1, constant_B1 = _mark_best(scores_BN, m, num_slots)
  index_Bm = _collect(marks_BO, num_slots)
  # False where scores are not finite, or too many of them are equal.
  fits_B1 = constant_B1 | ((marked_B1 >= m) & (marked_B1 <= num_slots))
  # The operands of a branch are written out first: fused into its gathers, they
  # would be computed again for every number.
  index_BM = jax.lax.cond(
    fits_B1.all(),
    lambda scores_BN, *slots: _sort(scores_BN, *slots, m=m),
    lambda scores_BN, *_: by_xla(scores_BN, m),
    scores_BN,
    index_Bm,
    marked_B1,
  )
  index_BM = jnp.where(
    constant_B1, jnp.arange(m, dtype=jnp.int32)[None], index_BM
  )
  return index_BM.reshape(*leading, m)


def _mark_best(scores_BN, m, num_slots):
  """Marks at least m scores of each row and, if possible, at most num_slots.

  Returns:
    (marks_BO, marked_B1, constant_B1): the marks of `_mark`, their number, and
    whether all scores of a row are equal, as those of padding are.
  """
  num_scores = scores_BN.shape[1]
  # With as many groups as this, a grid of m x m cells that is best in one
  # corner hardly ever has two of its m best in one group; and few other scores
  # reach the m-th maximum.
  num_groups = min(num_scores, _multiple_of_8(4.4 * m))
  best_Bn = functools.reduce(jnp.maximum, _strided(scores_BN, num_groups))
  highest_B1 = best_Bn.max(-1, keepdims=True)
  low_B1, high_B1 = jax.lax.fori_loop(
    0,
    STEPS,
    lambda _, bounds: _halve(best_Bn, m, *bounds),
    (best_Bn.min(-1, keepdims=True), highest_B1),
  )

  def survey(low_B1):
    marks_BO = _mark(scores_BN, low_B1)
    marked_B1 = _count(marks_BO).sum(-1, keepdims=True)
    constant_B1 = (marked_B1 == num_scores) & (low_B1 == highest_B1)
    return marks_BO, marked_B1, constant_B1

  def too_many(state):
    _, _, (_, marked_B1, constant_B1), step = state
    too_many_B1 = (marked_B1 > num_slots) & ~constant_B1
    return too_many_B1.any() & (step < MORE_STEPS)

  def raise_threshold(state):
    low_B1, high_B1, _, step = state
    low_B1, high_B1 = _halve(scores_BN, m, low_B1, high_B1)
    return low_B1, high_B1, survey(low_B1), step + 1

  return jax.lax.while_loop(
    too_many, raise_threshold, (low_B1, high_B1, survey(low_B1), 0)
  )[2]


def _multiple_of_8(number):
  return 8 * math.ceil(number / 8)


def _strided(x_BN, count):
  """Returns slices [B, count] whose columns i together are x[:, i::count].

  Elementwise operations on slices are vector instructions, where XLA reduces
  an axis number by number. The last slice is filled with -inf.
  """
  *slices, last = (
    x_BN[:, start : start + count] for start in range(0, x_BN.shape[1], count)
  )
  padding = [(0, 0), (0, count - last.shape[1])]
  return [*slices, jnp.pad(last, padding, constant_values=-jnp.inf)]


def _halve(x_BN, m, low_B1, high_B1):
  """Returns a range's upper half if m of x reach it, else its lower half."""
  middle_B1 = 0.5 * (low_B1 + high_B1)
  # A sum of floats, exact up to 2^24: XLA does not vectorize one of integers.
  reached_B1 = jnp.float32(x_BN >= middle_B1).sum(-1, keepdims=True)
  # The sum of two large scores overflows: -inf would mark what only pads.
  enough_B1 = (reached_B1 >= m) & (middle_B1 > low_B1)
  return (
    jnp.where(enough_B1, middle_B1, low_B1),
    jnp.where(enough_B1, high_B1, middle_B1),
  )


def _mark(scores_BN, low_B1):
  """Marks the scores that reach low, in words.

  Returns:
    [B, O] uint32; bit b of word o stands for score b * O + o.
  """
  num_words = _multiple_of_8(scores_BN.shape[1] / 32)
  return functools.reduce(
    jnp.bitwise_or,
    (
      jnp.uint32(slice_BO >= low_B1) << bit
      for bit, slice_BO in enumerate(_strided(scores_BN, num_words))
    ),
  )


def _count(marks_BO):
  return jax.lax.population_count(marks_BO).astype(jnp.float32)


def _collect(marks_BO, num_slots):
  """Returns the scores that are marked, in the order of words: [B, m] int32."""
  num_words = marks_BO.shape[1]
  count_BO = _count(marks_BO)
  # Marks up to the end of each word, by a matmul; exact in float32, too.
  end_BO = jnp.dot(
    count_BO,
    jnp.triu(jnp.ones((num_words, num_words), jnp.float32)),
    precision=jax.lax.Precision.HIGHEST,
  )
  slot_1m = jnp.arange(num_slots, dtype=jnp.float32)[None]
  zeros_Bm = jnp.zeros((marks_BO.shape[0], num_slots), jnp.float32)
  word_Bm = _over_columns(
    lambda word_Bm, end_B1: word_Bm + jnp.float32(end_B1 <= slot_1m),
    zeros_Bm,
    end_BO[:, :-1],
  ).astype(jnp.int32)
  take = lambda x_BO: jnp.take_along_axis(
    x_BO, word_Bm, axis=-1, mode="promise_in_bounds"
  )
  bits_Bm = take(marks_BO)
  # How many marks of its word precede a slot's mark.
  rank_Bm = (slot_1m - take(end_BO - count_BO)).astype(jnp.uint32)
  bit_Bm = jnp.zeros_like(word_Bm)
  for width in (16, 8, 4, 2, 1):
    lower_Bm = bits_Bm & jnp.uint32((1 << width) - 1)
    count_Bm = jax.lax.population_count(lower_Bm)
    is_upper_Bm = rank_Bm >= count_Bm
    rank_Bm -= jnp.where(is_upper_Bm, count_Bm, 0)
    bits_Bm = jnp.where(is_upper_Bm, bits_Bm >> width, lower_Bm)
    bit_Bm += jnp.where(is_upper_Bm, width, 0)
  return bit_Bm * num_words + word_Bm


def _sort(scores_BN, index_Bm, used_B1, m):
  """Returns the best m scores of the used slots, best first: [B, M] int32."""
  num_scores, num_slots = scores_BN.shape[1], index_Bm.shape[1]
  # The index of an unused slot is arbitrary.
  index_Bm = jnp.minimum(index_Bm, num_scores - 1)
  score_Bm = jnp.take_along_axis(
    scores_BN, index_Bm, axis=-1, mode="promise_in_bounds"
  )
  slot_1m = jnp.arange(num_slots, dtype=jnp.float32)[None]
  score_Bm = jnp.where(slot_1m < used_B1, score_Bm, -jnp.inf)
  index_Bm = index_Bm.astype(jnp.float32)
  rank_Bm = _over_columns(
    lambda rank_Bm, score_B1, index_B1: (
      rank_Bm
      + jnp.float32(
        (score_B1 > score_Bm) | ((score_B1 == score_Bm) & (index_B1 < index_Bm))
      )
    ),
    jnp.zeros_like(score_Bm),
    score_Bm,
    index_Bm,
  )
  rank_1M = jnp.arange(m, dtype=jnp.float32)[None]
  return _over_columns(
    lambda sorted_BM, rank_B1, index_B1: jnp.where(
      rank_B1 == rank_1M, index_B1, sorted_BM
    ),
    jnp.zeros((len(scores_BN), m), jnp.float32),
    rank_Bm,
    index_Bm,
  ).astype(jnp.int32)


def _over_columns(function, carry, *arrays_Bm):
  """Folds function over columns: (carry, *columns [B, 1]) -> carry.

  For a sum over an axis, XLA would first write out all its terms.
  """
  columns_mB1 = jax.tree.map(lambda x_Bm: x_Bm.T[..., None], arrays_Bm)
  return jax.lax.scan(
    lambda carry, columns_B1: (function(carry, *columns_B1), None),
    carry,
    columns_mB1,
    unroll=TERMS_PER_PASS,
  )[0]
