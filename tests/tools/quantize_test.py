"""Quantized tables: the error of a row, and what may be quantized."""

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util

from ultramem_jax import testing
from ultramem_jax.model import Transformer
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import quantize, training

MEMORIES = {
  # Both kinds of reads, of four blocks.
  "ultramem_v2": {
    "kind": "ultramem_v2",
    "spans": "1:1/2:2",
    "init": "official",
    "pre_value_dim": 4,
    "shared_projection": False,
  },
  "peer": {
    "kind": "peer",
    "value_projection": False,
    "num_cores": 1,
    "value_dim": 16,
    "expansion": 1,
    "init": "official",
  },
}


@pytest.mark.parametrize("memory", MEMORIES)
def test_scales_are_folded_into_the_reads(memory):
  """An int8 model gives what a float32 model with its numbers gives."""
  config = testing.small_config(
    **{
      f"model__memory__{name}": value
      for name, value in MEMORIES[memory].items()
    }
  )
  model = Transformer(config.model)
  tokens_BT = jnp.arange(24).reshape(2, 12)
  variables = testing.random_variables(model, tokens_BT)
  params = quantize.quantize(variables["params"], "int8")
  flat = traverse_util.flatten_dict(params, sep="/")
  scales = [path for path in flat if path.endswith("_scale")]
  assert scales
  for path in scales:
    table = path.removesuffix("_scale")
    flat[table] = flat[table] * flat.pop(path)[:, None]
  exact = traverse_util.unflatten_dict(flat, sep="/")
  narrow = Transformer(quantize.quantized_config(config, "int8").model)
  assert_close(
    jax.jit(narrow.apply)({**variables, "params": params}, tokens_BT),
    jax.jit(model.apply)({**variables, "params": exact}, tokens_BT),
  )


def test_only_float32_tables_are_quantized():
  config = quantize.quantized_config(testing.small_config(), "int8")
  with pytest.raises(ConfigError, match=r"table_dtype = 'int8': must be float"):
    quantize.quantized_config(config, "int8")
  dense = testing.small_config(model__memory__kind="none")
  with pytest.raises(ConfigError, match="kind = 'none': has no table"):
    quantize.quantized_config(dense, "int8")


def test_what_needs_float32_tables_is_left_behind():
  config = testing.small_config(
    optim__table_update="dense", model__memory__storage__kernel="pallas"
  )
  quantized = quantize.quantized_config(config, "int8")
  assert quantized.optim.table_update == "auto"
  assert quantized.model.memory.storage.kernel == "xla"


def test_int8_is_not_trained():
  config = quantize.quantized_config(testing.small_config(), "int8")
  with pytest.raises(ConfigError, match="table_dtype = 'int8': cannot be tr"):
    training.train(config, "unused")
