"""The learned factor of what a memory adds."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.layers import small_layer
from ultramem_jax.layers.gate import Gate
from ultramem_jax.model import MEMORIES
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.memory import MemoryConfig
from ultramem_jax.testing import assert_close

X, Y = (small_layer.inputs(seed=seed) for seed in (0, 1))
SEGMENTS = np.ones(X.shape[:2], np.int32)
SEGMENTS[0, 4:] = 0
PARAMS = {"scale": 0.7, "bias": -0.3, "weight": X[0, 0] / 4}


def gate(**changes):
  return Gate(dataclasses.replace(small_layer.SMALL, **changes))


@pytest.mark.parametrize("kind", ["scalar", "input"])
def test_the_factor_and_its_mean(kind):
  names = {"scalar": ["scale"], "input": list(PARAMS)}[kind]
  params = {name: np.float32(PARAMS[name]) for name in names}
  actual, sown = gate(gate=kind).apply(
    {"params": params}, X, Y, SEGMENTS, mutable=["stats"]
  )
  factor_BT = np.full(X.shape[:2], 0.7)
  if kind == "input":
    factor_BT *= 2 / (1 + np.exp(0.3 - X.astype(np.float64) @ PARAMS["weight"]))
  assert_close(actual, Y * factor_BT[..., None])
  (mean,) = sown["stats"]["mean"]
  np.testing.assert_allclose(mean, factor_BT[SEGMENTS > 0].mean(), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("start, factor", [("zero", 0), ("open", 1)])
def test_it_is_exact_at_the_start(start, factor, dtype):
  module = gate(gate="input", gate_init=start)
  x_BTD, y_BTD = X.astype(dtype), Y.astype(dtype)
  variables = module.init(jax.random.key(0), x_BTD, y_BTD, SEGMENTS)
  actual = module.apply(variables, x_BTD, y_BTD, SEGMENTS)
  np.testing.assert_array_equal(actual, factor * y_BTD)
  assert actual.dtype == dtype


@pytest.mark.parametrize("kind", MEMORIES)
def test_every_kind_of_memory_may_have_one(kind):
  """It has no part of the paper's models, whose parameters are the same."""
  config = MemoryConfig(
    **{"num_keys": 6, "key_dim": 5, "top_m": 3, "kind": kind},
    value_dim=small_layer.D,
    ring_layers=2 * (kind == "ultramem_v2"),
    init="official",
  )

  def parameters(gate):
    layer = MEMORIES[kind](
      dataclasses.replace(config, gate=gate), embed_dim=small_layer.D
    )
    variables = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), X))
    return traverse_util.flatten_dict(variables["params"], sep="/").keys()

  plain = parameters("none")
  assert parameters("input") - plain == {f"gating/{name}" for name in PARAMS}
  assert not any("gating" in path for path in plain)


def test_the_layer_multiplies_its_output():
  layer = small_layer.layer_of(gate="scalar")
  variables = small_layer.variables_of(layer)
  scale = variables["params"]["gating"]["scale"]
  assert_close(
    small_layer.apply(layer, variables, X),
    scale * small_layer.apply(small_layer.layer_of(), variables, X),
  )


@pytest.mark.parametrize(
  "changes, message",
  [
    ({"gate": "sigmoid"}, r"gate = 'sigmoid': must be one of none, scalar, in"),
    ({"gate_init": "one"}, r"gate_init = 'one': must be one of zero, open"),
    (
      {"output": "zero", "gate": "scalar"},
      r"gate_init = 'zero': must be 'open' with output = 'zero'",
    ),
  ],
)
def test_bad_settings(changes, message):
  with pytest.raises(ConfigError, match=f"model.memory.{message}"):
    gate(**changes)
