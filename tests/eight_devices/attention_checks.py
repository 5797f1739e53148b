"""Grouped heads on meshes against one device; see eight_devices_test."""

import functools

import jax
import numpy as np
import pytest

from ultramem_jax import testing
from ultramem_jax.model import Transformer
from ultramem_jax.serve import generate
from ultramem_jax.settings.sampling import Sampling
from ultramem_jax.testing import assert_close
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train import sharding, step
from ultramem_jax.train import state as state_lib

# Eight heads that share two of keys; the vocabulary is odd, and lies whole on
# every device.
MESHES = {
  "keys are split": {"mesh__fsdp": 2, "mesh__tensor": 2, "mesh__data": 2},
  "keys are whole": {"mesh__fsdp": 2, "mesh__tensor": 4},
}


def make_config(**mesh):
  return testing.small_config(
    batch_size=8,
    model__num_layers=1,
    model__memory__kind="none",
    model__vocab_size=265,
    model__num_heads=8,
    model__num_kv_heads=2,
    model__head_dim=4,
    model__qkv_bias=True,
    model__qk_norm="width",
    model__norm="rms",
    model__norm_position="post",
    model__sliding_window=5,
    **mesh,
  )


def make_batch(config):
  rng = np.random.default_rng(0)
  shape = (config.batch_size, config.data.seq_len)
  return {
    "tokens": rng.integers(3, 264, shape).astype(np.int32),
    "targets": rng.integers(3, 264, shape).astype(np.int32),
    "weights": np.ones(shape, np.float32),
    "segments": np.ones(shape, np.int32),
    "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
  }


def loss_and_gradients(variables, batch, config, layout):
  return jax.value_and_grad(
    lambda params: step.loss_fn(
      {**variables, "params": params},
      batch,
      jax.random.key(0),
      64.0,
      config=config,
      layout=layout,
    )[0]
  )(variables["params"])


def run(config, devices, variables):
  """(loss and gradients, greedy tokens) on the first devices."""
  mesh = mesh_lib.make(config, jax.devices()[:devices])
  layout = sharding.make_layout(config, mesh)
  places = sharding.shardings_of(
    state_lib.abstract_state(config, layout).variables()
  )
  variables = jax.device_put(variables, places)
  batch = sharding.to_devices(make_batch(config), mesh)
  losses = step.jitted(loss_and_gradients, config, layout)(variables, batch)
  tokens = generate.generate(
    Transformer(config.model, layout),
    variables,
    [np.array([5, 6, 7]), np.array([8])],
    Sampling(8, temperature=0.0),
    jax.random.key(0),
  )
  return jax.device_get(losses), [row_T.tolist() for row_T in tokens]


@functools.cache
def on_one_device():
  config = make_config()
  variables = jax.device_get(testing.random_state(config).variables())
  return variables, run(config, 1, variables)


@pytest.mark.parametrize("mesh", MESHES)
def test_grouped_heads_equal_one_device(mesh):
  variables, (expected, expected_tokens) = on_one_device()
  losses, tokens = run(make_config(**MESHES[mesh]), 8, variables)
  assert_close(losses, expected)
  assert tokens == expected_tokens
