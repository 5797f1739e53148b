"""The authors' layers: against goldens, and against themselves written out."""

import jax
import numpy as np
import pytest

from tests.interop import authors, weights
from ultramem_jax import interop, testing
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close


@authors.plain
def reference(kind, s, state_dict, x_BTD, cotangent_BTD):
  """Output, cells, scores; gradients of the tensors and of the input."""

  def loss(tensors, x_TD):
    y_TD, *found = authors.LAYERS[kind](s, {**buffers, **tensors}, x_TD)
    y_BTD = y_TD.reshape(x_BTD.shape)
    return (y_BTD * cotangent_BTD).sum(), (y_BTD, *found)

  tensors, buffers = authors.float_and_other(state_dict)
  x_TD = np.float64(x_BTD).reshape(-1, x_BTD.shape[-1])
  (_, (y, cell, score)), (grads, grad_x) = jax.jit(
    jax.value_and_grad(loss, (0, 1), has_aux=True)
  )(tensors, x_TD)
  return jax.device_get((y, cell, score, grads, grad_x.reshape(x_BTD.shape)))


def imported(kind, s, state_dict, x_BTD, cotangent_BTD):
  """The same of the imported layer; gradients under their names."""
  layer, variables = interop.from_official(kind, state_dict, **s)

  def loss(params, x_BTD):
    y_BTD, sown = layer.apply(
      {**variables, "params": params}, x_BTD, mutable=["intermediates"]
    )
    return (y_BTD * cotangent_BTD).sum(), (y_BTD, sown["intermediates"])

  (_, (y_BTD, sown)), (grads, grad_x) = jax.jit(
    jax.value_and_grad(loss, (0, 1), has_aux=True)
  )(variables["params"], x_BTD)
  tokens = x_BTD.shape[0] * x_BTD.shape[1]
  cell = np.asarray(sown["cell_BTAM"][0]).reshape(tokens, -1)
  score = np.asarray(sown["score_BTAMC"][0]).reshape(*cell.shape, -1)
  named = interop.to_official(kind, {"params": grads}, **s)
  return (y_BTD, cell, score, named, grad_x), (layer, variables)


def assert_same(actual, expected):
  """(output, cells, scores, gradients, gradient of the input)."""
  y, cell, score, grads, grad_x = actual
  y_, cell_, score_, grads_, grad_x_ = expected
  np.testing.assert_array_equal(cell, cell_)
  assert_close(y, y_)
  assert_close(score, score_)
  assert_close(grad_x, grad_x_)
  for name, grad in grads.items():
    if name in grads_ and grads_[name].any():
      assert_close(grad, grads_[name])
    else:
      assert not grad.any(), name  # such as Memory+'s unused key norm


def assert_new_weights_round_trip(kind, s, layer):
  """Export then import of variables such as the layer makes itself."""
  x_BTD = np.zeros((1, 2, layer.embed_dim), np.float32)
  fresh = testing.random_variables(layer, x_BTD)
  named = interop.to_official(kind, fresh, **s)
  _, again = interop.from_official(kind, named, **s)
  jax.tree.map(np.testing.assert_array_equal, again, fresh)


@pytest.mark.parametrize("name", ["v1_a", "v1_b", "v2_a", "memplus_a"])
def test_golden_layer(name):
  kind, s, state_dict, grads, arrays = weights.golden(name)
  expected = (
    arrays["output"],
    arrays["best_indice"],
    arrays["best_scores"].reshape(*arrays["best_indice"].shape, -1),
    grads,
    arrays["grad_input"],
  )
  inputs = (arrays["input"], arrays["cotangent"])
  actual, (layer, variables) = imported(kind, s, state_dict, *inputs)
  assert_same(actual, expected)
  weights.assert_same_tensors(
    interop.to_official(kind, variables, **s), state_dict
  )
  assert_new_weights_round_trip(kind, s, layer)
  # The layer as authors.py writes it is the authors' to the last digit, except
  # that their Memory+ takes the softmax in float32.
  tolerance = 1e-6 if kind == "memory_plus" else 1e-12
  y, cell, score, grads_, grad_x = reference(kind, s, state_dict, *inputs)
  np.testing.assert_array_equal(cell, expected[1])
  assert_close(
    (y, score, grad_x), (*expected[::2][:2], expected[4]), tolerance=tolerance
  )
  for name, grad in grads.items():
    assert_close(grads_[name], grad, tolerance=tolerance)


LAYER_NORM = dict(layer_norm_type="default", bias_for_layer_norm=True)
# Each covers several settings, in other combinations than the goldens.
CASES = {
  "v1 rank 1, no expansion, LayerNorm without bias, width of the model": (
    "ultramem_v1",
    {
      **weights.SMALL,
      "tucker_rank": 1,
      "value_expand_time": 1,
      "layer_norm_type": "default",
      "vdim": 24,
      "bias_for_layer_norm": None,
      "include_bias": False,
      "layer_norm_eps": 1e-3,
    },
  ),
  "v1 rank 3, E 9, one core, RMSNorm with bias": (
    "ultramem_v1",
    {
      **weights.SMALL,
      "tucker_rank": 3,
      "value_expand_time": 9,
      "tucker_multihead": 1,
      "head": 2,
      "include_bias": True,
    },
  ),
  "v1 rank 4, E 16, four cores, LayerNorm": (
    "ultramem_v1",
    {
      **weights.SMALL,
      **LAYER_NORM,
      "tucker_rank": 4,
      "head": 2,
      "value_expand_time": 16,
      "tucker_multihead": 4,
    },
  ),
  "v2 one query pair, ring": (
    "ultramem_v2",
    {
      **weights.SMALL_V2,
      "mem_q_for_each_tucker_rank": False,
      "head": 2,
      "mem_layer_num": 4,
      "share_ratio": 0.55,
      "layer_id": 3,
    },
  ),
  "v2 four heads, outside its ring": (
    "ultramem_v2",
    {**weights.SMALL_V2, "head": 4, "mem_layer_num": 2, "layer_id": 5},
  ),
  "v2 three heads, rank 3, LayerNorm": (
    "ultramem_v2",
    {**weights.SMALL_V2, **LAYER_NORM, "head": 3, "tucker_rank": 3},
  ),
  "v2 ring, keys expanded": (
    "ultramem_v2",
    {
      **weights.SMALL_V2,
      "mem_layer_num": 3,
      "share_ratio": 0.3,
      "layer_id": 2,
      "mem_key_expand_time": 2,
      "head": 2,
    },
  ),
  "v2 keys and values expanded, pre-values": (
    "ultramem_v2",
    {
      **weights.SMALL_V2,
      "mem_layer_num": 2,
      "layer_id": 1,
      "share_ratio": 0.7,
      "mem_key_expand_time": 3,
      "value_expand_time": 9,
      "pre_vdim": 7,
    },
  ),
  "v2 gated": (
    "ultramem_v2",
    {
      **weights.SMALL_V2,
      "pre_vdim": 6,
      "mem_use_glu_act": True,
      "mem_layer_num": 2,
      "share_ratio": 0.5,
      "layer_id": 1,
      "tucker_multihead": 3,
      "tucker_rank": 1,
      "mem_key_expand_time": 2,
    },
  ),
  "memory plus, three heads, LayerNorm": (
    "memory_plus",
    {**weights.SMALL_PLUS, **LAYER_NORM, "head": 3},
  ),
  "meta": ("meta_memory", weights.SMALL_META),
  "meta, gated": (
    "meta_memory",
    {
      **weights.SMALL_META,
      "mem_gated": True,
      "mem_v_dim": 14,
      "mem_query_bias": False,
    },
  ),
  "meta, no swilu": (
    "meta_memory",
    {**weights.SMALL_META, "swilu_projection": False, "mem_v_dim": 8},
  ),
  "meta, no projection": (
    "meta_memory",
    {**weights.SMALL_META, "swilu_projection": False},
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_layer_is_the_authors(case):
  kind, s = CASES[case]
  state_dict = weights.random_tensors(kind, s)
  width = s.get("hidden_size", s.get("input_dim"))
  rng = np.random.default_rng(1)
  x, cotangent = rng.normal(size=(2, 2, 5, width)).astype(np.float32)
  actual, (layer, variables) = imported(kind, s, state_dict, x, cotangent)
  assert_same(actual, reference(kind, s, state_dict, x, cotangent))
  weights.assert_same_tensors(
    interop.to_official(kind, variables, **s), state_dict
  )
  if case in ("v2 gated", "v2 three heads, rank 3, LayerNorm", "meta, gated"):
    assert_new_weights_round_trip(kind, s, layer)


def test_surplus_query_pairs_are_kept_with_zero_gradient():
  kind, s = "ultramem_v2", {**weights.SMALL_V2, "head": 2, "tucker_rank": 3}
  state_dict = weights.random_tensors(kind, s)
  x = np.random.default_rng(1).normal(size=(1, 6, 24)).astype(np.float32)
  (_, _, _, grads, _), _ = imported(kind, s, state_dict, x, np.ones_like(x))
  grad = grads["query_proj.weight"].reshape(3, -1)
  assert grad[0].any() and not grad[1:].any()


def test_unknown_kind_is_refused():
  with pytest.raises(ConfigError, match="ultramem_v1, ultramem_v2, memory_pl"):
    interop.from_official("ultramem_v3", {}, **weights.SMALL)
