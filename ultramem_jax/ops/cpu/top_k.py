"""The m largest of many scores: the exact form that each platform does best."""

import functools
import math

import jax
import jax.numpy as jnp

# Below this many rows, what the sieve costs whatever its size outweighs what it
# saves.
SIEVE_ROWS = 64
# Halvings of the range in which the threshold lies: by the maxima of groups,
# and at most so many more by all scores.
STEPS, MORE_STEPS = 8, 24
# Terms of a sum that one pass over it adds.
TERMS_PER_PASS = 4


def top_m(scores, m: int):
  """Indices of the m largest along the last axis, best first; no gradient.

  Exact; of equal scores the lowest index comes first.

  Args:
    scores: [..., N] float32, finite. (XLA sorts every other type in full on
      a CPU.) Where they are not, indices are still in range.
    m: at most N.
  Returns:
    [..., m] int32.
  """
  scores = jax.lax.stop_gradient(scores)
  if math.prod(scores.shape[:-1]) < SIEVE_ROWS:
    return _top_k(scores, m)
  return jax.lax.platform_dependent(
    scores,
    cpu=lambda scores: sieve(scores, m),
    default=lambda scores: _top_k(scores, m),
  )


def _top_k(scores, m):
  # In two dimensions: in more, the TPU's compiler sorts in full, where it has a
  # top-k of its own for more than about 64 m scores. The barrier keeps XLA from
  # merging a later slice into the top-k, which turns it into a full sort. It
  # holds the index alone: XLA for several devices aborts on a barrier of both
  # results.
  *leading, num_scores = scores.shape
  index = jax.lax.top_k(scores.reshape(-1, num_scores), m)[1]
  return jax.lax.optimization_barrier(index).reshape(*leading, m)


def sieve(scores, m: int):
  """`top_m` by a threshold that at least m scores reach, and few more.

  The m-th largest of the maxima of groups is such a threshold. Those that reach
  it are moved together, into slots, and sorted by counting for each how many
  are better. All of it are loops of vector instructions over all rows; XLA's
  own top-k on a CPU goes number by number, in one thread. It is asked where
  equal scores are too many for the slots.

  Letters: L rows, G groups, S slots, Z words of 32 scores.
  """
  *leading, num_scores = scores.shape
  scores_LN = scores.reshape(-1, num_scores)
  # As many groups as this hold, in a grid of m x m cells that is best in one
  # corner, hardly ever two of the m best; and few other scores reach their m-th
  # maximum.
  num_groups = min(num_scores, _multiple_of_8(4.4 * m))
  num_slots = _multiple_of_8(1.5 * m)
  best_LG = functools.reduce(jnp.maximum, _strided(scores_LN, num_groups))
  highest_L1 = best_LG.max(-1, keepdims=True)
  low_L1, high_L1 = jax.lax.fori_loop(
    0,
    STEPS,
    lambda _, bounds: _halve(best_LG, m, *bounds),
    (best_LG.min(-1, keepdims=True), highest_L1),
  )

  def survey(low_L1):
    """Marks, how many, and whether a row is of one score, as padding is."""
    marks_LZ = _mark(scores_LN, low_L1)
    marked_L1 = _count(marks_LZ).sum(-1, keepdims=True)
    constant_L1 = (marked_L1 == num_scores) & (low_L1 == highest_L1)
    return marks_LZ, marked_L1, constant_L1

  def too_many(state):
    _, _, (_, marked_L1, constant_L1), step = state
    too_many_L1 = (marked_L1 > num_slots) & ~constant_L1
    return too_many_L1.any() & (step < MORE_STEPS)

  def raise_threshold(state):
    low_L1, high_L1, _, step = state
    low_L1, high_L1 = _halve(scores_LN, m, low_L1, high_L1)
    return low_L1, high_L1, survey(low_L1), step + 1

  _, _, (marks_LZ, marked_L1, constant_L1), _ = jax.lax.while_loop(
    too_many, raise_threshold, (low_L1, high_L1, survey(low_L1), 0)
  )
  index_LS = _collect(marks_LZ, num_slots)
  # Not so where scores are no numbers, or too many of them are equal.
  fits_L1 = constant_L1 | ((marked_L1 >= m) & (marked_L1 <= num_slots))
  # A branch's operands are written out first: fused into its gathers, they
  # would be computed again for every number.
  index_LM = jax.lax.cond(
    fits_L1.all(),
    lambda scores_LN, *slots: _sort(scores_LN, *slots, m),
    lambda scores_LN, *_: _top_k(scores_LN, m),
    scores_LN,
    index_LS,
    marked_L1,
  )
  index_LM = jnp.where(constant_L1, jnp.arange(m)[None], index_LM)
  return index_LM.reshape(*leading, m)


def _multiple_of_8(number):
  return 8 * math.ceil(number / 8)


def _strided(x_LN, count):
  """Slices [L, count], of which column i together are x[:, i::count].

  Elementwise operations on them are vector instructions, where XLA reduces an
  axis number by number. The last slice is filled with -inf.
  """
  *slices, last = (
    x_LN[:, start : start + count] for start in range(0, x_LN.shape[1], count)
  )
  padding = [(0, 0), (0, count - last.shape[1])]
  return [*slices, jnp.pad(last, padding, constant_values=-jnp.inf)]


def _halve(x_LN, m, low_L1, high_L1):
  """The upper half of a range if m of x reach it, else the lower half."""
  middle_L1 = 0.5 * (low_L1 + high_L1)
  # Sums of floats, exact up to 2^24: those of integers are not vectorized.
  reached_L1 = jnp.float32(x_LN >= middle_L1).sum(-1, keepdims=True)
  enough_L1 = reached_L1 >= m
  return (
    jnp.where(enough_L1, middle_L1, low_L1),
    jnp.where(enough_L1, high_L1, middle_L1),
  )


def _mark(scores_LN, low_L1):
  """[L, Z] uint32: bit b of word z says if score b * Z + z reaches low."""
  num_words = _multiple_of_8(scores_LN.shape[1] / 32)
  return functools.reduce(
    jnp.bitwise_or,
    (
      jnp.uint32(slice_LZ >= low_L1) << bit
      for bit, slice_LZ in enumerate(_strided(scores_LN, num_words))
    ),
  )


def _count(marks_LZ):
  return jax.lax.population_count(marks_LZ).astype(jnp.float32)


def _collect(marks_LZ, num_slots):
  """[L, S] int32: the index of the j-th mark, in the order of words."""
  num_words = marks_LZ.shape[1]
  count_LZ = _count(marks_LZ)
  # Marks up to and with a word, by a matmul; float32 is exact here too.
  end_LZ = jnp.dot(
    count_LZ,
    jnp.triu(jnp.ones((num_words, num_words))),
    precision=jax.lax.Precision.HIGHEST,
  )
  slot_1S = jnp.arange(num_slots, dtype=jnp.float32)[None]
  zeros_LS = jnp.zeros((marks_LZ.shape[0], num_slots))
  word_LS = _over_columns(
    lambda word_LS, end_L1: word_LS + (end_L1 <= slot_1S),
    zeros_LS,
    end_LZ[:, :-1],
  ).astype(jnp.int32)
  take = lambda x_LZ: jnp.take_along_axis(
    x_LZ, word_LS, axis=-1, mode="promise_in_bounds"
  )
  bits_LS = take(marks_LZ)
  # Of a word the mark is after so many others.
  rank_LS = (slot_1S - take(end_LZ - count_LZ)).astype(jnp.uint32)
  bit_LS = jnp.zeros_like(word_LS)
  for width in (16, 8, 4, 2, 1):
    lower_LS = bits_LS & jnp.uint32((1 << width) - 1)
    count_LS = jax.lax.population_count(lower_LS)
    is_upper_LS = rank_LS >= count_LS
    rank_LS -= jnp.where(is_upper_LS, count_LS, 0)
    bits_LS = jnp.where(is_upper_LS, bits_LS >> width, lower_LS)
    bit_LS += jnp.where(is_upper_LS, width, 0)
  return bit_LS * num_words + word_LS


def _sort(scores_LN, index_LS, used_L1, m):
  """[L, M] int32: the best m of the slots used, best first."""
  num_scores, num_slots = scores_LN.shape[1], index_LS.shape[1]
  # Slots that are not used have any index.
  index_LS = jnp.minimum(index_LS, num_scores - 1)
  score_LS = jnp.take_along_axis(
    scores_LN, index_LS, axis=-1, mode="promise_in_bounds"
  )
  slot_1S = jnp.arange(num_slots, dtype=jnp.float32)[None]
  score_LS = jnp.where(slot_1S < used_L1, score_LS, -jnp.inf)
  index_LS = index_LS.astype(jnp.float32)
  rank_LS = _over_columns(
    lambda rank_LS, score_L1, index_L1: (
      rank_LS
      + (
        (score_L1 > score_LS) | ((score_L1 == score_LS) & (index_L1 < index_LS))
      )
    ),
    jnp.zeros_like(score_LS),
    score_LS,
    index_LS,
  )
  rank_1M = jnp.arange(m, dtype=jnp.float32)[None]
  return _over_columns(
    lambda sorted_LM, rank_L1, index_L1: jnp.where(
      rank_L1 == rank_1M, index_L1, sorted_LM
    ),
    jnp.zeros((len(scores_LN), m)),
    rank_LS,
    index_LS,
  ).astype(jnp.int32)


def _over_columns(function, carry, *arrays_LS):
  """carry = function(carry, *columns [L, 1]) for each column in turn.

  As a sum over an axis, XLA would first write out all its terms.
  """
  columns_SL1 = jax.tree.map(lambda x_LS: x_LS.T[..., None], arrays_LS)
  return jax.lax.scan(
    lambda carry, columns_L1: (function(carry, *columns_L1), None),
    carry,
    columns_SL1,
    unroll=TERMS_PER_PASS,
  )[0]
