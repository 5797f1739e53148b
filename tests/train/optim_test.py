"""Tests of schedules, parameter groups and the optimizer's arithmetic."""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from ultramem_jax import testing
from ultramem_jax.testing import assert_close
from ultramem_jax.train import optim
from ultramem_jax.train import state as state_lib
from ultramem_jax.train import tables as tables_lib

GOLDEN = pathlib.Path(__file__).parents[1] / "goldens" / "value_lr_schedule"
CONFIG = testing.small_config().optim


@functools.cache
def golden():
  """The published code's rates: (settings, arrays)."""
  return (
    json.loads(GOLDEN.with_suffix(".json").read_text()),
    dict(np.load(GOLDEN.with_suffix(".npz"))),
  )


def optim_config(**changes):
  return dataclasses.replace(CONFIG, **changes)


@pytest.mark.parametrize("horizon", [1.0, 0.5])
@pytest.mark.parametrize("multiplier", [1, 4, 10])
def test_rates_equal_the_golden_ones(multiplier, horizon):
  settings, arrays = golden()
  main = settings["main"]
  steps = main["max_steps"]
  config = optim_config(
    learning_rate=main["initial_lr"],
    init_fraction=0.1,
    warmup_fraction=main["warmup_steps"] / steps,
    final_fraction=main["alpha_f"],
    value_lr_multiplier=float(multiplier),
    value_lr_horizon=horizon,
  )
  at = jnp.asarray(arrays["steps"], jnp.int32)
  name = f"times{multiplier}_rate{horizon}"
  for schedule, expected in (
    (optim.base_schedule, arrays["base_lr"]),
    (optim.value_schedule, arrays[f"value_lr/{name}"]),
    (optim.value_multiplier, arrays[f"multiplier/{name}"]),
  ):
    np.testing.assert_allclose(
      schedule(config, steps)(at), expected, rtol=2e-5, atol=1e-12
    )


def test_rates_from_zero_equal_the_golden_ones():
  settings, arrays = golden()
  small_run = settings["small"]
  steps = small_run["t_max"]
  config = optim_config(
    learning_rate=small_run["initial_lr"],
    init_fraction=0.0,
    warmup_fraction=small_run["warmup_steps"] / steps,
    final_fraction=small_run["alpha_f"],
    value_lr_multiplier=10.0,
    value_lr_horizon=0.5,
  )
  at = jnp.asarray(arrays["small/steps"], jnp.int32)
  for schedule, name in (
    (optim.base_schedule, "base_lr"),
    (optim.value_schedule, "value_lr_times10_rate0.5"),
  ):
    np.testing.assert_allclose(
      schedule(config, steps)(at),
      arrays[f"small/{name}"],
      rtol=2e-5,
      atol=1e-12,
    )


@pytest.mark.parametrize(
  "overrides",
  [
    {"model__memory__kind": "none", "model__memory__spans": ""},
    {},
    {
      "model__memory__spans": "1:1/2:2",
      "model__memory__imported__norm_bias": True,
    },
    {
      "model__norm_bias": True,
      "model__qk_norm": "head",
      "model__activation": "swiglu",
      "model__tie_embeddings": True,
    },
    {
      "model__norm": "rms",
      "model__memory__query_key_norm": "rms",
      "model__moe__num_experts": 2,
    },
  ],
  ids=["dense", "ultramem", "two memories", "biases", "moe"],
)
def test_tables_norms_and_weights_are_told_apart(overrides):
  config = testing.small_config(**overrides)
  state = jax.eval_shape(lambda: state_lib.init_state(config))
  memory = config.model.memory
  assert set(state.tables) == {
    f"memory_{span.index}/values" for span in config.model.spans
  }
  for table in state.tables.values():
    assert table.values_IW.shape == (memory.num_rows, memory.value_dim)
  params = traverse_util.flatten_dict(state.params, sep="/")
  assert not any(tables_lib.is_table(path) for path in params)
  # Vectors are norm weights and biases, and there are no others.
  for path, leaf in params.items():
    assert optim.is_scale_or_bias(path) == (leaf.ndim == 1), path
  assert any(map(optim.is_scale_or_bias, params))


@pytest.mark.parametrize(
  "path, expected",
  [
    ("values", True),
    ("memory_0/values", True),
    ("model/block_1/memory/pre_values", True),
    ("memory_0/up_values", True),
    ("memory_0/down_values", True),
    ("memory_0/values_scale", False),
    ("memory_0/value_projection", False),
    ("head/my_values", False),
  ],
)
def test_tables_are_known_by_their_name(path, expected):
  assert tables_lib.is_table(path) == expected


def toy_params(seed=0):
  """Parameters as those of a model: a table, a norm, and weights."""
  key = jax.random.split(jax.random.key(seed), 4)
  return {
    "memory_0": {
      "values": jax.random.normal(key[0], (5, 3)),
      "value_projection": jax.random.normal(key[1], (2, 3)),
      "query_norm": {"scale": jax.random.normal(key[2], (3,))},
    },
    "head": {"kernel": jax.random.normal(key[3], (3, 2))},
  }


def adamw(config, steps, params, gradients):
  """The parameters after some gradients, from the definition, in float64."""
  paths = [
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, _ in jax.tree_util.tree_leaves_with_path(params)
  ]
  leaves, structure = jax.tree.flatten(params)
  params = [np.asarray(leaf, np.float64) for leaf in leaves]
  first = [np.zeros_like(p) for p in params]
  second = [np.zeros_like(p) for p in params]
  warmup = round(config.warmup_fraction * steps)
  peak, low = config.learning_rate, config.final_fraction
  for count, gradient in enumerate(gradients, 1):
    gradient = [np.asarray(g, np.float64) for g in jax.tree.leaves(gradient)]
    norm = math.sqrt(sum((g**2).sum() for g in gradient))
    if config.clip_norm and norm > config.clip_norm:
      gradient = [g * config.clip_norm / norm for g in gradient]
    if count < warmup:
      start = config.init_fraction
      rate = peak * (start + (1 - start) * count / warmup)
    else:
      share = (count - warmup) / (steps - warmup)
      rate = peak * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)
    left = max(0, 1 - count / (config.value_lr_horizon * steps))
    factor = 1 + (config.value_lr_multiplier - 1) * left
    for i, g in enumerate(gradient):
      first[i] = config.beta1 * first[i] + (1 - config.beta1) * g
      second[i] = config.beta2 * second[i] + (1 - config.beta2) * g**2
      update = first[i] / (1 - config.beta1**count)
      update /= np.sqrt(second[i] / (1 - config.beta2**count)) + config.eps
      if paths[i] == "memory_0/values" and config.table_rule == "sgd":
        update = g.copy()
      if not paths[i].endswith("scale") or config.decay_norms:
        update += config.weight_decay * params[i]
      own = rate * (factor if paths[i] == "memory_0/values" else 1)
      params[i] = params[i] - own * update
  return structure.unflatten(params)


def trained(config, steps, params, gradients):
  """The parameters after some gradients: the optimizer and the dense update."""
  params, tables = tables_lib.take_tables(params, config.moments)
  optimizer = optim.make_optimizer(config, steps)
  state = optimizer.init(params)
  for step, gradient in enumerate(gradients, 1):
    norm = optax.tree.norm(gradient)
    gradient, of_tables = tables_lib.split_tables(gradient)
    updates, state = optimizer.update(
      gradient, state, params, norm=norm, is_taken=jnp.bool_(True)
    )
    params = optax.apply_updates(params, updates)
    scale = optim.clip_factor(config, norm)
    tables = optim.update_all_rows(
      tables,
      tables_lib.TableGradients(
        of_tables, {}, scale, jnp.int32(step), jnp.bool_(True)
      ),
      config,
      steps,
    )
  return tables_lib.join_tables(params, tables)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"decay_norms": True, "weight_decay": 0.5},
    {"clip_norm": 0.0},
    {"clip_norm": 0.1},
    {"value_lr_multiplier": 1.0},
    {"value_lr_horizon": 0.25, "init_fraction": 0.2},
    {"table_rule": "sgd"},
  ],
)
def test_updates_are_those_of_adamw_or_of_sgd(changes):
  steps = 20
  config = optim_config(
    **{"learning_rate": 0.01, "warmup_fraction": 0.15, "eps": 1e-3, **changes}
  )
  start = toy_params()
  # The first lies within the norm of 1, the others far outside.
  gradients = [
    jax.tree.map(lambda x, s=scale: s * x, toy_params(seed))
    for seed, scale in enumerate((0.01, 3.0, 10.0, 0.5, 2.0, 1.0), 1)
  ]
  params = trained(config, steps, start, gradients)
  expected = adamw(config, steps, start, gradients)
  change = lambda tree: jax.tree.map(jnp.subtract, tree, start)
  assert_close(change(params), change(expected), tolerance=2e-5)


def test_first_update_of_tables_is_the_multiple_of_the_others():
  config = optim_config(
    warmup_fraction=0.0, weight_decay=0.0, value_lr_multiplier=10.0, eps=1e-16
  )
  zeros = jax.tree.map(jnp.zeros_like, toy_params())
  ones = jax.tree.map(jnp.ones_like, zeros)
  moved = traverse_util.flatten_dict(
    trained(config, 100, zeros, [ones]), sep="/"
  )
  sizes = {path: abs(float(leaf.max())) for path, leaf in moved.items()}
  table = sizes.pop("memory_0/values")
  others = list(sizes.values())
  # 1 + 9 * (1 - 1 / 100): the first update is step 1 of 100.
  assert len(others) == 3
  np.testing.assert_allclose(table / np.array(others), 9.91, rtol=1e-5)


def test_norms_decay_only_when_asked():
  params = toy_params()
  zeros = jax.tree.map(jnp.zeros_like, params)

  def decayed(**changes):
    config = optim_config(init_fraction=1.0, **changes)
    after = trained(config, 10, params, [zeros])
    return {
      path
      for path, change in traverse_util.flatten_dict(
        jax.tree.map(jnp.subtract, after, params), sep="/"
      ).items()
      if abs(change).max() > 0
    }

  scale = "memory_0/query_norm/scale"
  every = decayed(decay_norms=True)
  assert scale in every and len(every) == 4
  assert decayed() == every - {scale}
  assert decayed(weight_decay=0.0, decay_norms=True) == set()
