"""The layer inside a Flax NNX model, as the example has it."""

import pathlib
import runpy

import flax
import jax
import numpy as np
import optax
from flax import nnx

from ultramem_jax import UltraMem, testing

EXAMPLE = pathlib.Path(__file__).parents[2] / "examples" / "memory_in_nnx.py"


def test_the_example_computes_and_trains_the_layer():
  example = runpy.run_path(str(EXAMPLE))
  tokens_BT = jax.random.randint(jax.random.key(0), (2, 6), 0, 64)
  x_BTD = jax.random.normal(jax.random.key(1), (2, 6, 32))
  with flax.config.temp_flip_flag("always_shard_variable", False):
    net = example["init"](tokens_BT)
    params = nnx.to_pure_dict(nnx.state(net.memory, nnx.Param))
    buffers = nnx.variablelib.variable_type_from_name("buffers")
    others = nnx.to_pure_dict(nnx.state(net.memory, buffers))
    variables = {"params": params, "buffers": others}
    layer = UltraMem(example["MEMORY"], embed_dim=32)
    expected_BTD = jax.jit(layer.apply)(variables, x_BTD)
    apply = nnx.jit(lambda memory, x_BTD: memory(x_BTD))
    testing.assert_close(apply(net.memory, x_BTD), expected_BTD)
    before = jax.tree.map(np.array, nnx.state(net.memory, nnx.Param))
    optimizer = nnx.Optimizer(net, optax.sgd(1.0), wrt=nnx.Param)
    example["train_step"](net, optimizer, tokens_BT)
  after = nnx.state(net.memory, nnx.Param)
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
  assert all(jax.tree.leaves(moved)), moved
