"""The m largest of many scores: the exact form that each platform does best."""

import math

import jax
import jax.numpy as jnp

# Below this many rows, what a round of the tournament costs whatever its size
# outweighs what it saves (benchmarks/layer.py).
TOURNAMENT_ROWS = 128


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
  if math.prod(scores.shape[:-1]) < TOURNAMENT_ROWS:
    return _top_k(scores, m)
  return jax.lax.platform_dependent(
      scores, cpu=lambda scores: tournament(scores, m),
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


def tournament(scores, m: int):
  """`top_m` in m rounds, each of which takes the best score that is left.

  Scores form groups of about sqrt(N), whose best ones are kept: a round finds
  the best group, its first member of that score, and the group's next best.
  All rows go through a round together, in vector instructions; XLA's own
  top-k on a CPU goes number by number, in one thread.
  """
  *leading, num_scores = scores.shape
  size = _group_size(num_scores)
  num_groups = math.ceil(num_scores / size)
  padding = num_groups * size - num_scores
  if padding:
    scores = jnp.pad(
        scores, [(0, 0)] * len(leading) + [(0, padding)],
        constant_values=-jnp.inf,
    )
  grouped = scores.reshape(*leading, num_groups, size)
  # Indices are counted in float32, exact up to 2^24: only reductions of
  # floats become vector instructions.
  group = _iota(leading, num_groups)
  member = _iota(leading, size)

  def play(carry, _):
    best, last_score, last_index = carry
    score = best.max(-1, keepdims=True)
    first = jnp.where(best == score, group, num_groups - 1).min(
        -1, keepdims=True
    )
    members = jnp.take_along_axis(
        grouped, first[..., None].astype(jnp.int32), axis=-2,
        mode="promise_in_bounds",
    ).squeeze(-2)
    index = first * size + member
    left = (members < last_score) | (
        (members == last_score) & (index > last_index)
    )
    chosen = jnp.where(
        (members == score) & left, index, num_scores - 1
    ).min(-1, keepdims=True)
    next_best = jnp.where(
        (members < score) | ((members == score) & (index > chosen)), members,
        -jnp.inf,
    ).max(-1, keepdims=True)
    best = jnp.where(group == first, next_best, best)
    return (best, score, chosen), chosen.squeeze(-1)

  column = (*leading, 1)
  start = (
      grouped.max(-1), jnp.full(column, jnp.inf), jnp.full(column, -1.0)
  )
  index = jax.lax.scan(play, start, None, length=m)[1]
  return jnp.moveaxis(index, 0, -1).astype(jnp.int32)


def _iota(leading, size):
  return jax.lax.broadcasted_iota(
      jnp.float32, (*leading, size), len(leading)
  )


def _group_size(num_scores):
  """The divisor nearest the square root, if within a factor 2; or the root."""
  root = math.sqrt(num_scores)
  divisors = [
      size for size in range(math.ceil(root / 2), math.floor(2 * root) + 1)
      if num_scores % size == 0
  ]
  return min(
      divisors, key=lambda size: abs(size - root), default=math.ceil(root)
  )
