"""Runs that train changes of low rank, and what becomes of them."""

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import AbstractMesh

from tests.train import small_steps
from ultramem_jax import Transformer, testing
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.tools import accounting
from ultramem_jax.train import init_from, preconditions, sharding
from ultramem_jax.train import mesh as mesh_lib

TARGETS = "attention/(query|out)|mlp/up"


def make_config(**overrides):
  return testing.small_config(
    **{
      "model__num_layers": 1,
      "model__memory__kind": "none",
      "model__lora__rank": 2,
      "model__lora__targets": TARGETS,
      "optim__trainable": "lora_",
      "optim__warmup_fraction": 0.0,
      **overrides,
    }
  )


def flat(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def test_lora_alone_is_trained():
  config = make_config()
  state = small_steps.first_state(config)
  before = flat(state.variables()["params"])
  for seed in range(2):
    batch = small_steps.make_batch(config, seed)
    state, _ = small_steps.train_step(state, batch, config)
  after = flat(state.variables()["params"])
  moved = {x for x in after if small_steps.differ(after[x], before[x])}
  assert moved == {x for x in after if "lora_" in x}
  assert len(moved) == 6
  assert flat(state.opt_state[1].mu).keys() == moved


def test_the_two_matrices_are_split_as_their_map_is():
  config = make_config(mesh__fsdp=2, mesh__tensor=2)
  sizes = mesh_lib.shape(config, 4)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  specs = sharding.parameter_specs(config, sharding.make_layout(config, mesh))
  found = {k: tuple(v) for k, v in specs.items() if "/lora_" in k}
  assert found == {
    "block_0/attention/query/lora_a": ("fsdp", None),
    "block_0/attention/query/lora_b": (None, "tensor", None),
    "block_0/attention/out/lora_a": ("tensor", None, None),
    "block_0/attention/out/lora_b": (None, "fsdp"),
    "block_0/mlp/up/lora_a": ("fsdp", None),
    "block_0/mlp/up/lora_b": (None, "tensor"),
  }


def test_a_run_begins_with_the_base_and_new_lora(tmp_path):
  base = make_config(model__lora__rank=0, optim__trainable="all")
  testing.save_run(tmp_path, base)
  plan = init_from.plan(make_config(init_from=str(tmp_path)))
  assert len(plan.new) == 6 and all("lora_" in path for path in plan.new)
  assert len(plan.taken) == len(sharding.parameter_axes(base.model))
  assert plan.left == plan.changed == []


def test_the_same_lora_of_another_strength_is_told(tmp_path):
  testing.save_run(tmp_path, make_config())
  told = lambda **changes: (
    init_from.plan(make_config(init_from=str(tmp_path), **changes)).changed
  )
  assert told() == []
  (changed,) = told(model__lora__alpha=3.0)
  assert changed.startswith("model.lora = LoraConfig(rank=2, alpha=3.0")


def test_rematerialized_blocks_have_the_same_parameters():
  model = make_config(model__remat="block").model
  token_BT = np.zeros((1, 1), np.int32)
  shapes = jax.eval_shape(Transformer(model).init, jax.random.key(0), token_BT)
  paths = traverse_util.flatten_dict(nn.unbox(shapes["params"]), sep="/").keys()
  assert paths == sharding.parameter_axes(make_config().model).keys()


def test_parameters_and_flops():
  config = make_config()
  plain = accounting.report(make_config(model__lora__rank=0).model)
  costs = accounting.report(config.model)
  query, out, up = 2 * (16 + 16), 2 * (16 + 16), 2 * (16 + 32)
  added = query + out + up
  assert costs["params"]["dense"] == plain["params"]["dense"] + added
  assert costs["flops_per_token"] == plain["flops_per_token"] + 2 * added
  assert costs["flops_by_part"]["mlp"] == plain["flops_by_part"]["mlp"] + 2 * up


def test_targets_must_match_a_linear_map():
  preconditions.require_matching_patterns(make_config())
  with pytest.raises(
    ConfigError,
    match=r"targets = 'q_proj': matches no linear map; there are "
    "block_0/attention/key, .*head",
  ):
    preconditions.require_matching_patterns(
      make_config(model__lora__targets="q_proj", optim__trainable="all")
    )
