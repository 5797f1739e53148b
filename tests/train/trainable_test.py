"""Runs that train some of the parameters, and keep the others."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.train import small_steps
from ultramem_jax import testing
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.tools import fit
from ultramem_jax.train import optim, preconditions


def flat(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def make_config(**overrides):
  return small_steps.make_config(
    **{**small_steps.SPARSE_SETTINGS, "optim__trainable": "memory", **overrides}
  )


def changed(config, steps=2):
  """Paths of the parameters that some steps change, and of the others."""
  state = small_steps.first_state(config)
  before = flat(state.variables()["params"])
  for seed in range(steps):
    batch = small_steps.make_batch(config, seed)
    state, _ = small_steps.train_step(state, batch, config)
  after = flat(state.variables()["params"])
  assert after.keys() == before.keys()
  moved = {x for x in after if small_steps.differ(after[x], before[x])}
  return moved, after.keys() - moved, state


@pytest.mark.parametrize("update", ["sparse", "dense"])
def test_what_is_frozen_stays_bit_equal_without_moments(update):
  config = make_config(optim__table_update=update)
  moved, same, state = changed(config)
  assert "memory_0/values" in moved and "memory_0/query" in moved
  assert {x for x in same if x.startswith("memory")} == set()
  assert not any(x.startswith("memory") for x in same) and same
  moments = state.opt_state[1].mu
  assert {x.split("/")[0] for x in flat(moments)} == {"memory_0"}


@pytest.mark.parametrize("pattern, stays", [("values", True), ("core", False)])
def test_a_frozen_memory_reads_the_same_rows(pattern, stays):
  """Its buffers may be of the core before the last update."""
  config = make_config(optim__trainable=f"memory_0/{pattern}")
  state = small_steps.first_state(config)
  lagging = jax.tree.map(lambda x: x + 0.1 * (x > 0), state.buffers)
  state = state.replace(buffers=lagging)
  after, _ = small_steps.train_step(
    state, small_steps.make_batch(config), config
  )
  for name in ("u", "t"):
    now, before = (x["memory_0"][name] for x in (after.buffers, lagging))
    assert np.array_equal(now, before) == stays


def test_a_frozen_table_has_no_moments_and_no_update():
  config = make_config(optim__trainable="memory_0/query$")
  moved, _, state = changed(config)
  assert moved == {"memory_0/query"}
  assert state.tables == {} and "values" in state.frozen["memory_0"]


def test_the_gradient_of_what_is_trained_is_that_of_a_whole_run():
  """Without clipping, whose norm is that of what is trained."""
  overrides = {"optim__clip_norm": 0.0, "optim__table_update": "dense"}
  config = make_config(**overrides)
  whole = make_config(**overrides, optim__trainable="all")
  start, batch = small_steps.first_state(whole), small_steps.make_batch()
  expected, _ = small_steps.train_step(start, batch, whole)
  first = small_steps.first_state(config)
  testing.assert_close(first.variables(), start.variables(), tolerance=0)
  actual, _ = small_steps.train_step(first, batch, config)
  for name in ("query", "values", "value_projection"):
    testing.assert_close(
      actual.variables()["params"]["memory_0"][name],
      expected.variables()["params"]["memory_0"][name],
    )


def test_state_and_its_parts_for_a_checkpoint():
  config = make_config()
  state = small_steps.first_state(config)
  items = state.to_items()
  again = type(state).from_items(items, config.optim.trainable)
  small_steps.assert_same_bits(again, state)
  assert items["rest"].frozen == {}


def test_bytes_are_those_of_what_is_trained():
  need = fit.training_bytes(make_config(optim__table_update="dense"))
  state = small_steps.first_state(make_config(optim__table_update="dense"))
  trained = sum(x.nbytes for x in jax.tree.leaves(state.params))
  tables = sum(table.values_IW.nbytes for table in state.tables.values())
  assert need["gradients"] == trained + tables
  assert need["optimizer"] == 2 * (trained + tables)


def test_a_pattern_must_be_one_and_match():
  preconditions.require_matching_patterns(
    make_config(optim__trainable="values$")
  )
  with pytest.raises(ConfigError, match="matches no parameter; there are bl"):
    preconditions.require_matching_patterns(
      make_config(optim__trainable="no_such")
    )
  with pytest.raises(ConfigError, match=r"optim.trainable = '\(': is not a r"):
    make_config(optim__trainable="(")
  with pytest.raises(ConfigError, match="must say what is trained"):
    make_config(optim__trainable="")


def test_rates_are_multiplied_by_the_first_pattern_found():
  updates = {
    "embed": np.float32(1),
    "head": {"kernel": np.float32(1), "bias": np.float32(1)},
  }
  config = make_config(optim__rate_multipliers="bias=0,head=5,embed|head=0.1")
  scaled = optim.multiplied(config.optim, updates)
  assert scaled == {
    "embed": pytest.approx(0.1),
    "head": {"kernel": 5, "bias": 0},
  }
  moved, _, _ = changed(
    make_config(optim__rate_multipliers="query=0", optim__weight_decay=0.5), 1
  )
  assert "memory_0/query" not in moved and "memory_0/values" in moved


@pytest.mark.parametrize(
  "text", ["memory", "=2", "a=-1", "a=x", "a=1.2.3", "a=nan", "(=2", "a=1e4"]
)
def test_bad_multipliers(text):
  with pytest.raises(ConfigError, match=r"optim\.rate_multipliers = "):
    make_config(optim__rate_multipliers=text)


def test_reads_that_cannot_be_counted_are_refused():
  big = {"batch_size": 2**20, "data__seq_len": 2**10}
  with pytest.raises(ConfigError, match=r"batch_size = 1048576: reads"):
    preconditions.require_trainable(make_config(optim__trainable="all", **big))


@pytest.mark.parametrize(
  ("text", "pattern"),
  [
    ("emebd=0.1", "emebd"),  # matches nothing
    ("values=5", "values"),  # a table
    ("query=2,memory_0/query=3", "memory_0/query"),  # decided by the first
    ("block_0=0.5", "block_0"),  # is not trained
  ],
)
def test_multipliers_of_nothing_are_refused(text, pattern):
  config = make_config(optim__rate_multipliers=text)
  with pytest.raises(ConfigError, match=rf"{text}': '{pattern}' decides the"):
    preconditions.require_trainable(config)


@pytest.mark.parametrize(
  ("settings", "field"),
  [
    ({"model__lora__rank": 2}, "lora.rank = 2: adds block_0/"),
    ({"model__adapter_dim": 4}, "adapter_dim = 4: adds block_0/adapter/down"),
    ({"model__memory__output": "zero"}, "memory.output = 'zero': leaves mem"),
  ],
)
def test_a_new_part_that_nothing_trains_is_refused(settings, field):
  config = make_config(**settings, optim__trainable="head")
  with pytest.raises(ConfigError, match=rf"model\.{field}"):
    preconditions.require_new_parts_can_learn(config)
  preconditions.require_new_parts_can_learn(config, new=[])
  preconditions.require_new_parts_can_learn(
    make_config(**settings, optim__trainable="lora_|adapter|memory")
  )


@pytest.mark.parametrize(
  ("settings", "pattern", "field"),
  [
    ({"model__memory__output": "zero"}, "memory.*values", "output = 'zero'"),
    ({"model__memory__output": "empty"}, "memory.*key", "output = 'empty'"),
    ({"model__memory__gate": "scalar"}, "memory.*values", "gate_init = 'zero'"),
  ],
)
def test_a_new_memory_that_would_never_learn_is_refused(
  settings, pattern, field
):
  """Where it is nought, the gradient of all others of its parameters is."""
  config = make_config(**settings, optim__trainable=pattern)
  with pytest.raises(ConfigError, match=rf"model\.memory\.{field}: leaves mem"):
    preconditions.require_new_parts_can_learn(config)
  # One that was trained before is open; and so is one that learns as a whole.
  preconditions.require_new_parts_can_learn(config, new=[])
  preconditions.require_new_parts_can_learn(make_config(**settings))
  preconditions.require_new_parts_can_learn(
    make_config(optim__trainable=pattern)
  )
