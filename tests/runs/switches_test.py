"""JAX's own switches: the layer works under them, or a command refuses them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import (
  tiny,
  tiny_memory_plus,
  tiny_moe,
  tiny_peer,
  tiny_ultramem_v2,
)
from ultramem_jax import MemoryConfig, UltraMem, testing
from ultramem_jax.model import Transformer
from ultramem_jax.runs import switches
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.train import state as state_lib
from ultramem_jax.train import step as step_lib


@pytest.mark.parametrize(
  "module",
  [tiny, tiny_ultramem_v2, tiny_memory_plus, tiny_peer, tiny_moe],
  ids=lambda module: module.__name__,
)
def test_models_have_no_wide_and_no_mixed_types(module):
  """Nothing is compiled: dtypes are decided when a program is traced."""
  c = module.get_config()
  c.model.num_layers = 1
  c.model.memory.spans = "1:1" if c.model.memory.kind != "none" else ""
  model = Transformer(config_lib.parse(c).model)
  tokens_BT = jnp.zeros((2, 64), jnp.int32)

  def gradients():
    def square(params, rest):
      logits_BTV = model.apply({"params": params, **rest}, tokens_BT)
      return jnp.square(logits_BTV).sum()

    variables = model.init(jax.random.key(0), tokens_BT)
    params = variables.pop("params")
    return params, jax.grad(square)(params, variables)

  with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
    made = jax.eval_shape(gradients)
  assert {x.dtype for x in jax.tree.leaves(made)} == {np.dtype("float32")}


def test_a_layer_computes_the_same_where_float64_is_on():
  memory = MemoryConfig(num_keys=8, key_dim=4, value_dim=8, top_m=3)
  layer = UltraMem(memory, embed_dim=16)
  x_BTD = np.random.default_rng(0).normal(size=(2, 5, 16)).astype(np.float32)
  variables = testing.random_variables(layer, x_BTD)
  expected = jax.jit(layer.apply)(variables, x_BTD)
  with jax.enable_x64(True):
    actual = jax.jit(layer.apply)(variables, x_BTD)
  assert actual.dtype == jnp.float32
  testing.assert_close(actual, expected)


@pytest.mark.parametrize("update", ["sparse", "dense"])
def test_steps_have_the_same_types_where_float64_is_on(update):
  config = testing.small_config(optim__table_update=update)

  def step(state, batch):
    state, gradients, metrics = step_lib.model_step(state, batch, config=config)
    tables = step_lib.table_step(state.tables, gradients, config=config)
    return state.replace(tables=tables), metrics

  state = jax.eval_shape(lambda: state_lib.init_state(config))
  batch = step_lib.abstract_batch(config)
  expected = jax.eval_shape(step, state, batch)
  with jax.enable_x64(True):
    assert jax.eval_shape(step, state, batch) == expected


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("jax_disable_jit", True),
    ("jax_numpy_dtype_promotion", "strict"),
    ("jax_transfer_guard", "disallow"),
    ("jax_transfer_guard_device_to_host", "disallow_explicit"),
  ],
)
def test_a_command_refuses_by_name_what_it_cannot_work_under(name, value):
  switches.require_usable()
  before = getattr(jax.config, name)
  jax.config.update(name, value)
  try:
    with pytest.raises(ConfigError, match=f"^{name.upper()} = .*must be"):
      switches.require_usable()
  finally:
    jax.config.update(name, getattr(before, "value", before))
