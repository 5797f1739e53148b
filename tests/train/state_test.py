"""What a run carries, and what a checkpoint keeps of it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from tests.train import small_steps
from ultramem_jax import testing
from ultramem_jax.train import state as state_lib


def test_items_of_a_checkpoint_come_back():
  leaves, tree = jax.tree.flatten(small_steps.first_state())
  # No two of them are equal.
  state = tree.unflatten([leaf + i for i, leaf in enumerate(leaves)])
  items = state.to_items()
  assert set(items) == {"params", "buffers", "rest"}
  count = sum(len(jax.tree.leaves(tree)) for tree in items.values())
  assert count == len(jax.tree.leaves(state))  # nothing is kept twice
  small_steps.assert_same_bits(
    state_lib.TrainState.from_items(items, "all"), state
  )


def test_the_seed_decides_the_first_state():
  dense = small_steps.make_config(
    model__memory__kind="none", model__memory__spans=""
  )

  def initialized(seed):
    config = dataclasses.replace(dense, seed=seed)
    return jax.jit(functools.partial(state_lib.init_state, config))()

  same, again, other = map(initialized, (0, 0, 1))
  small_steps.assert_same_bits(same, again)
  assert small_steps.differ(other.params["head"], same.params["head"])
  assert small_steps.differ(other.key, same.key)
  by_argument = functools.partial(state_lib.init_state, dense, None)
  given = jax.jit(by_argument)(jnp.uint32(1))
  testing.assert_close(given, other)
