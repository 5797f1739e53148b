"""Changes of low rank: what a linear map adds, and where a model has them."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from tests import small_model
from ultramem_jax import Transformer, testing
from ultramem_jax.layers.linear import Linear
from ultramem_jax.serve import generate, prepare
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.lora import LoraConfig
from ultramem_jax.settings.sampling import Sampling
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import merge_lora

LORA = LoraConfig(rank=3, alpha=5.0, targets="")
EVERYWHERE = r"attention/(query|key|value|out)|mlp/(up|gate|down)|head"
# Grouped heads with biases, and an MLP with a gate.
CONFIG = small_model.dense_config(
  **{"num_kv_heads": 1, "qkv_bias": True, "activation": "swiglu"},
  **{"lora__rank": 3, "lora__alpha": 5.0, "lora__targets": EVERYWHERE},
)
BASE = dataclasses.replace(CONFIG, lora=LoraConfig())


def flat(tree) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


@pytest.mark.parametrize("prepared_for", [None, "cpu"])
@pytest.mark.parametrize("inputs, outputs", [((6,), (2, 4)), ((3, 2), (5,))])
def test_a_map_adds_the_product_of_two_matrices(inputs, outputs, prepared_for):
  rng = np.random.default_rng(0)
  x = rng.normal(size=(2, 7, *inputs)).astype(np.float32)
  axes = ("embed",) * len((*inputs, *outputs))
  linear = Linear(outputs, 0.1, axes, len(inputs), use_bias=True, lora=LORA)
  params = testing.random_variables(linear, x)["params"]
  exact = {k: np.asarray(v, np.float64) for k, v in params.items()}
  a, b = exact["lora_a"], exact["lora_b"]
  assert a.shape == (*inputs, 3) and b.shape == (3, *outputs)
  change = np.einsum("IR,RO->IO", a.reshape(6, 3), b.reshape(3, -1))
  kernel = exact["kernel"].reshape(6, -1) + 5 / 3 * change
  y = np.einsum("BTI,IO->BTO", x.reshape(2, 7, 6), kernel)
  expected = y.reshape(2, 7, *outputs) + exact["bias"]
  linear = linear.clone(prepared_for=prepared_for)
  actual, _ = linear.apply({"params": params}, x, mutable=["prepared"])
  assert_close(actual, expected)


def test_base_parameters_are_drawn_as_without_lora():
  x = np.ones((1, 1, 4), np.float32)
  linear = Linear((6,), 0.1, ("embed", "mlp"), use_bias=True, lora=LORA)
  params, base = (
    nn.unbox(module.init(jax.random.key(3), x)["params"])
    for module in (linear, linear.clone(lora=LoraConfig()))
  )
  a, b = params.pop("lora_a"), params.pop("lora_b")
  jax.tree.map(np.testing.assert_array_equal, params, base)
  assert 0 < np.abs(a).max() <= 0.5  # 1 / sqrt(4)
  assert not np.any(b)


def test_step_0_is_that_of_the_model_alone_to_the_bit():
  params = flat(small_model.variables_of(CONFIG)["params"])
  base = flat(small_model.variables_of(BASE)["params"])
  maps = {path.removesuffix("/kernel") for path in base if "kernel" in path}
  assert params.keys() - base.keys() == {
    f"{path}/{name}" for path in maps for name in ("lora_a", "lora_b")
  }
  zero = {
    path: jnp.zeros_like(x) if path.endswith("lora_b") else x
    for path, x in params.items()
  }
  logits = [
    small_model.apply(
      c,
      {"params": traverse_util.unflatten_dict(x, sep="/")},
      small_model.TOKENS,
    )
    for c, x in ((CONFIG, zero), (BASE, base))
  ]
  np.testing.assert_array_equal(*logits)


# In bfloat16 a dozen roundings of 2^-8 lie between the two.
@pytest.mark.parametrize(
  "dtype, tolerance", [("float32", 1e-5), ("bfloat16", 12 / 256)]
)
def test_merged_weights_give_the_same_logits(dtype, tolerance):
  one, other = (dataclasses.replace(c, dtype=dtype) for c in (CONFIG, BASE))
  variables = small_model.variables_of(one)
  merged = {"params": merge_lora.merge(variables["params"], CONFIG.lora)}
  assert (
    flat(merged["params"]).keys()
    == flat(small_model.variables_of(other)["params"]).keys()
  )
  assert_close(
    small_model.apply(one, variables, small_model.TOKENS),
    small_model.apply(other, merged, small_model.TOKENS),
    tolerance=tolerance,
  )


def test_cached_decoding_continues_as_whole_texts_do():
  """Prepared as for serving, whose matrices a CPU reads transposed."""
  variables = small_model.variables_of(CONFIG)
  model, held = prepare.prepare(Transformer(CONFIG), variables)
  made = generate.generate(
    model,
    held,
    list(small_model.TOKENS),
    Sampling(3, temperature=0.0),
    jax.random.key(0),
  )
  text_BT = np.concatenate([small_model.TOKENS, made], axis=1)
  position_BT = np.arange(text_BT.shape[1], dtype=np.int32) + 0 * text_BT
  logits_BTV = small_model.logits_of(
    CONFIG, text_BT, np.ones_like(text_BT), position_BT
  )
  greedy_BT = np.asarray(logits_BTV).argmax(-1)[:, small_model.T - 1 : -1]
  np.testing.assert_array_equal(made, greedy_BT)


@pytest.mark.parametrize(
  "field, value, message",
  [
    ("rank", -1, "must be at least 0"),
    ("alpha", 0.0, "must be positive"),
    ("targets", "(", "is not a regular expression"),
  ],
)
def test_bad_settings(field, value, message):
  with pytest.raises(ConfigError, match=f"model.lora.{field} = .*{message}"):
    LoraConfig(**{field: value})
