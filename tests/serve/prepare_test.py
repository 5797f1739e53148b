"""Serving: prepared variables give what the others give, and read less."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ultramem_jax import MemoryConfig, MemoryPlus, UltraMem, testing
from ultramem_jax.layers import ultramem
from ultramem_jax.model import Transformer
from ultramem_jax.ops.cpu import matmul
from ultramem_jax.serve import generate
from ultramem_jax.serve import prepare as prepare_lib
from ultramem_jax.testing import assert_close


@functools.cache
def make_model(**overrides):
  config = testing.small_config(**overrides)
  model = Transformer(config.model)
  return model, testing.random_variables(model, jnp.zeros((1, 8), jnp.int32))


LAYERS = {
  "query_per_rank": (UltraMem, {}),
  "shared_query": (
    UltraMem,
    {"query_per_rank": False, "tucker_rank": 3, "num_heads": 4},
  ),
  "sum": (UltraMem, {"score": "sum", "num_cores": 1}),
  "memory_plus": (MemoryPlus, {"kind": "memory_plus"}),
}
# Tokens of two rows, with merged keys and without.
LENGTHS = ultramem.MERGED_TOKENS // 2, ultramem.MERGED_TOKENS


@pytest.mark.parametrize("case", LAYERS)
def test_prepared_equals_unprepared(case):
  layer_class, settings = LAYERS[case]
  config = MemoryConfig(
    num_keys=16,
    key_dim=4,
    value_dim=8,
    top_m=5,
    **{"init": "official", **settings},
  )
  layer = layer_class(config, embed_dim=12)
  random = np.random.default_rng(0)
  x_BTD = random.normal(size=(2, max(LENGTHS), 12)).astype(np.float32)
  variables = testing.random_variables(layer, x_BTD)
  served, prepared = prepare_lib.prepare(layer, variables, x_BTD)
  assert ("merged_keys" in prepared["prepared"]) == (case == "shared_query")
  assert "keys" not in prepared["params"]
  forward, forward_served = (
    jax.jit(functools.partial(layer.apply, mutable=["intermediates"]))
    for layer in (layer, served)
  )
  for length in LENGTHS:
    y_BTD, sown = forward_served(prepared, x_BTD[:, :length])
    expected_BTD, expected = forward(variables, x_BTD[:, :length])
    assert_close(y_BTD, expected_BTD)
    for name in ("cell_BTAM", "slot_BTAM"):
      np.testing.assert_array_equal(
        sown["intermediates"][name][0], expected["intermediates"][name][0]
      )


def prepared_shapes(model, variables, platform=None):
  """(model, variables) as `prepare` returns them, shapes for numbers."""
  served = []

  def prepare(variables):
    model_for_platform, prepared = prepare_lib.prepare(
      model, variables, platform=platform
    )
    served.append(model_for_platform)
    return prepared

  shapes = jax.eval_shape(prepare, variables)
  return served[0], shapes


def test_models_read_what_they_are_prepared_for_and_nothing_else():
  """What a model computes depends on its attribute, not on a collection."""
  model, variables = make_model(model__num_layers=1, model__memory__spans="1:1")
  served, prepared = prepare_lib.prepare(model, variables, platform="gpu")
  tokens_BT = jnp.arange(8).reshape(2, -1)
  with pytest.raises(ValueError, match="the variables lack prepared/memory_0"):
    jax.eval_shape(served.apply, variables, tokens_BT)
  wrong = jax.tree.map(
    lambda x: np.full(x.shape, np.nan, x.dtype), prepared["prepared"]
  )
  forward = jax.jit(model.apply)
  np.testing.assert_array_equal(
    forward({**variables, "prepared": wrong}, tokens_BT),
    forward(variables, tokens_BT),
  )


def test_bfloat16_weights_are_cast_once_and_change_nothing():
  model, variables = make_model(model__dtype="bfloat16")
  served, prepared = prepare_lib.prepare(model, variables)
  params, cast = variables["params"], prepared["params"]
  assert cast["embed"]["embedding"].dtype == jnp.bfloat16
  transposed = prepared["prepared"]
  assert transposed["block_0"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
  assert transposed["memory_0"]["value_projection"].dtype == jnp.bfloat16
  for name in ("values", "core"):
    assert cast["memory_0"][name] is params["memory_0"][name]
  tokens_BT = jnp.arange(2 * ultramem.MERGED_TOKENS).reshape(2, -1)
  np.testing.assert_array_equal(
    jax.jit(served.apply)(prepared, tokens_BT),
    jax.jit(model.apply)(variables, tokens_BT),
  )


@pytest.mark.parametrize("kind", ["dense", "moe", "ultramem"])
def test_a_cpu_serves_transposed_matrices_and_no_other(kind):
  overrides = {
    "moe": {"model__moe__num_experts": 4, "model__moe__expert_dim": 24},
    "dense": {"model__memory__kind": "none"},
    "ultramem": {"model__memory__num_heads": 2},
  }[kind]
  model, variables = make_model(
    model__activation="swiglu",
    model__num_layers=1,
    model__memory__spans="1:1",
    **overrides,
  )
  flatten = functools.partial(traverse_util.flatten_dict, sep="/")
  params = flatten(variables["params"])
  on_cpu, for_cpu = prepare_lib.prepare(model, variables)
  _, for_gpu = prepared_shapes(model, variables, "gpu")
  keys = set() if kind == "dense" else {"memory_0/keys"}
  assert set(flatten(for_gpu["prepared"])) == keys
  assert flatten(for_gpu["params"]).keys() == params.keys() - keys
  moved = flatten(for_cpu["prepared"])
  assert flatten(for_cpu["params"]).keys() == params.keys() - moved.keys()
  assert "block_0/attention/out/kernel" in moved
  for path in moved.keys() - keys:
    assert moved[path].size == params[path].size
    assert moved[path].shape != params[path].shape
  # Few rows, and more than a CPU multiplies the other way round.
  forward, forward_served = jax.jit(model.apply), jax.jit(on_cpu.apply)
  for shape in ((2, 5), (matmul.FEW_ROWS, 2)):
    tokens_BT = np.arange(math.prod(shape), dtype=np.int32).reshape(shape) % 100
    assert_close(
      forward_served(for_cpu, tokens_BT), forward(variables, tokens_BT)
    )


def decode_step_text(num_keys, **overrides):
  """The compiled text of a decoding step."""
  model, variables = make_model(
    model__memory__num_keys=num_keys,
    model__memory__spans="1:2/2:2",
    **overrides,
  )
  model, variables = prepared_shapes(model, variables)
  cache = generate.init_cache(model, 3, 300)
  token_B1 = jnp.ones((3, 1), jnp.int32)
  return (
    generate.decode_step.lower(
      model, variables, cache, token_B1, token_B1, token_B1
    )
    .compile()
    .as_text()
  )


# Instructions that hand arrays on and make none.
HANDED_ON = r" (parameter|tuple|get-tuple-element|bitcast|while|conditional)\("


def makers(text, shapes):
  """Lines that make an array whose shape begins with one of shapes."""
  pattern = rf"= \w+\[({'|'.join(shapes)})[,\]]"
  return [
    line
    for line in text.splitlines()
    if re.search(pattern, line) and not re.search(HANDED_ON, line)
  ]


def test_a_decoding_step_makes_nothing_of_the_tables_size():
  side = 31  # 961 rows, 3844 virtual ones: numbers of nothing else
  text = decode_step_text(side)
  assert not makers(text, [str(side**2), str(4 * side**2)])
  # Nor are the keys copied: [2 sides, 2 heads, 2 ranks, 62, 4], transposed.
  width = testing.MODEL["model.memory.key_dim"]
  assert not makers(text, [rf"[\d,]+,{width},{2 * side}"])
  # What the pattern finds in a program that makes such arrays.
  assert makers("%a = f32[961,8]{1,0} copy(%b)", [str(side**2)])
  assert " sort(" not in text


def test_a_decoding_step_writes_its_cache_in_place():
  text = decode_step_text(8)
  aliased = re.search(r"input_output_alias=\{(.*?)\}, entry", text)[1]
  model, _ = make_model(
    model__memory__num_keys=8, model__memory__spans="1:2/2:2"
  )
  leaves = jax.tree.leaves(generate.init_cache(model, 3, 300))
  assert aliased.count("may-alias") + aliased.count("must-alias") == len(leaves)
  # No array as long as the cache is made but by updates in place.
  updates = [
    line
    for line in makers(text, ["3,2,300"])
    if "dynamic-update-slice" not in line
  ]
  assert not updates
