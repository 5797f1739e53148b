"""Steps that would harm a run are skipped: it keeps what it has learned.

Such a step has a loss or a gradient norm that is not finite, or a norm far
above those before it. It counts as a step, and its batch as seen.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops import precision
from ultramem_jax.settings.guard import GuardConfig
from ultramem_jax.train.tables import Tables

# The mean of gradient norms forgets this share of itself at each step, and is
# reliable after this many steps.
FORGETS = 0.02
KNOWN_AFTER = 50


class Guard(NamedTuple):
  """What a run remembers of its steps; scalars.

  skipped: int32, steps skipped since the start.
  in_a_row: int32, of these the last ones, without another between.
  norm_sum: float32, running sum of gradient norms with weights that fade.
  """

  skipped: jax.Array
  in_a_row: jax.Array
  norm_sum: jax.Array


def new_guard() -> Guard:
  """Returns the guard before the first step."""
  return Guard(jnp.int32(0), jnp.int32(0), jnp.float32(0))


def judge(
  guard: Guard, step: jax.Array, loss: Any, norm: jax.Array, config: GuardConfig
) -> tuple[jax.Array, Guard]:
  """Decides whether a step is taken.

  Args:
    guard: before the step.
    step: int32 scalar, counted from 1.
    loss: scalar, of the batch.
    norm: scalar, of all gradients.
    config: what counts as a spike.
  Returns:
    (is_taken, guard): bool scalar; and the guard after the step.
  """
  is_taken = jnp.isfinite(loss) & jnp.isfinite(norm)
  if config.spike:
    count = step - 1 - guard.skipped
    weights = 1 - (1 - FORGETS) ** count.astype(jnp.float32)
    mean = guard.norm_sum / jnp.maximum(weights, FORGETS)
    is_taken &= (count < KNOWN_AFTER) | (norm <= config.spike * mean)
  skipped = 1 - is_taken.astype(jnp.int32)
  norm_sum = (1 - FORGETS) * guard.norm_sum + FORGETS * norm
  return is_taken, Guard(
    guard.skipped + skipped,
    skipped * (guard.in_a_row + 1),
    jnp.where(is_taken, norm_sum, guard.norm_sum),
  )


def keep(is_taken: jax.Array, new: Any, old: Any) -> Any:
  """Returns the new arrays if the step is taken, else the old ones.

  Integers are counters of steps, and always new.
  """
  return jax.tree.map(
    lambda new, old: (
      jnp.where(is_taken, new, old)
      if jnp.issubdtype(new.dtype, jnp.floating)
      else new
    ),
    new,
    old,
  )


def keep_reads(is_taken: jax.Array, reads: Any, tables: Tables) -> Any:
  """Returns sorted reads; if no step is taken, all point past the last row."""
  return {
    path: (jnp.where(is_taken, row_Z, len(tables[path].values_IW)), read_Z)
    for path, (row_Z, read_Z) in reads.items()
  }


def are_finite(state: Any) -> jax.Array:
  """Returns whether all numbers of a state are finite, a bool scalar."""
  return jnp.stack(
    [
      jnp.isfinite(precision.decode(x)).all()
      for x in jax.tree.leaves(state)
      if jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.uint16
    ]
  ).all()
