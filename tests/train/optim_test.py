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

from ultramem_jax import testing
from ultramem_jax.testing import assert_close
from ultramem_jax.train import optim
from ultramem_jax.train import state as state_lib

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
  rates = optim.schedules(config, steps)
  at = jnp.asarray(arrays["steps"], jnp.int32)
  name = f"times{multiplier}_rate{horizon}"
  factor = optim.value_multiplier(config, steps)
  for schedule, expected in (
    (rates["weights"], arrays["base_lr"]),
    (rates["norms"], arrays["base_lr"]),
    (rates["values"], arrays[f"value_lr/{name}"]),
    (factor, arrays[f"multiplier/{name}"]),
  ):
    np.testing.assert_allclose(schedule(at), expected, rtol=2e-5, atol=1e-12)


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
  rates = optim.schedules(config, steps)
  at = jnp.asarray(arrays["small/steps"], jnp.int32)
  for group, name in (
    ("weights", "base_lr"),
    ("values", "value_lr_times10_rate0.5"),
  ):
    np.testing.assert_allclose(
      rates[group](at), arrays[f"small/{name}"], rtol=2e-5, atol=1e-12
    )


@pytest.mark.parametrize(
  "overrides",
  [
    {"model__memory__kind": "none", "model__memory__spans": ""},
    {},
    {"model__memory__spans": "1:1/2:2", "model__memory__norm_bias": True},
    {
      "model__norm_bias": True,
      "model__qk_norm": True,
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
def test_every_parameter_is_in_its_group(overrides):
  config = testing.small_config(**overrides)
  params = jax.eval_shape(lambda: state_lib.init_state(config)).params
  groups = optim.parameter_groups(params)
  assert jax.tree.structure(groups) == jax.tree.structure(params)
  memory = config.model.memory
  table = (memory.num_rows, memory.value_dim)
  found = set()

  def check(path, leaf, group):
    name = jax.tree_util.keystr(path)
    found.add(group)
    # Vectors are norm weights and biases, and there are no others.
    assert (group == "norms") == (leaf.ndim == 1), name
    assert (group == "values") == name.endswith("['values']"), name
    assert group != "values" or leaf.shape == table, name

  jax.tree_util.tree_map_with_path(check, params, groups)
  assert found == {"norms", "weights"} | (
    {"values"} & set(["values"] if config.model.spans else [])
  )


def toy_params(seed=0):
  """Parameters of the three groups, and of each a path in a model."""
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
  leaves, structure = jax.tree.flatten(params)
  params = [np.asarray(leaf, np.float64) for leaf in leaves]
  groups = jax.tree.leaves(optim.parameter_groups(structure.unflatten(leaves)))
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
      if groups[i] != "norms" or config.decay_norms:
        update += config.weight_decay * params[i]
      own = rate * (factor if groups[i] == "values" else 1)
      params[i] = params[i] - own * update
  return structure.unflatten(params)


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"decay_norms": True, "weight_decay": 0.5},
    {"clip_norm": 0.0},
    {"clip_norm": 0.1},
    {"value_lr_multiplier": 1.0},
    {"value_lr_horizon": 0.25, "init_fraction": 0.2},
  ],
)
def test_updates_are_those_of_adamw(changes):
  steps = 20
  config = optim_config(
    **{"learning_rate": 0.01, "warmup_fraction": 0.15, "eps": 1e-3, **changes}
  )
  optimizer = optim.make_optimizer(config, steps)
  params = start = toy_params()
  state = optimizer.init(params)
  # The first lies within the norm of 1, the others far outside.
  gradients = [
    jax.tree.map(lambda x, s=scale: s * x, toy_params(seed))
    for seed, scale in enumerate((0.01, 3.0, 10.0, 0.5, 2.0, 1.0), 1)
  ]
  for gradient in gradients:
    updates, state = optimizer.update(gradient, state, params)
    params = optax.apply_updates(params, updates)
  expected = adamw(config, steps, start, gradients)
  change = lambda tree: jax.tree.map(jnp.subtract, tree, start)
  assert_close(change(params), change(expected), tolerance=2e-5)


def test_first_update_of_tables_is_the_multiple_of_the_others():
  config = optim_config(
    warmup_fraction=0.0, weight_decay=0.0, value_lr_multiplier=10.0, eps=1e-20
  )
  optimizer = optim.make_optimizer(config, 100)
  params = jax.tree.map(jnp.ones_like, toy_params())
  updates, _ = optimizer.update(params, optimizer.init(params), params)
  sizes = {
    jax.tree_util.keystr(path): abs(float(leaf.max()))
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
  }
  (table,) = (size for name, size in sizes.items() if "values'" in name)
  others = [size for name, size in sizes.items() if "values'" not in name]
  # 1 + 9 * (1 - 1 / 100): the first update is step 1 of 100.
  assert len(others) == 3
  np.testing.assert_allclose(table / np.array(others), 9.91, rtol=1e-5)


def test_norms_decay_only_when_asked():
  params = toy_params()
  zeros = jax.tree.map(jnp.zeros_like, params)

  def decayed(**changes):
    optimizer = optim.make_optimizer(
      optim_config(init_fraction=1.0, **changes), 10
    )
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    return {
      jax.tree_util.keystr(path)
      for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
      if abs(leaf).max() > 0
    }

  scale = "['memory_0']['query_norm']['scale']"
  every = decayed(decay_norms=True)
  assert scale in every and len(every) == 4
  assert decayed() == every - {scale}
  assert decayed(weight_decay=0.0, decay_norms=True) == set()
