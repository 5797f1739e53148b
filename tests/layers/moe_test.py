"""The mixture of experts against a loop over its experts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import tiny_dense
from ultramem_jax import testing
from ultramem_jax.layers import moe as moe_lib
from ultramem_jax.model import Transformer
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close
from ultramem_jax.train import step

B, T, D, F, X = 3, 7, 16, 12, 6


def make_config(activation="gelu", dtype="float32", **moe):
  c = tiny_dense.get_config()
  c.batch_size = 4
  c.data.seq_len = 8
  c.model.update(
    vocab_size=32,
    embed_dim=D,
    num_layers=2,
    num_heads=2,
    activation=activation,
    dtype=dtype,
  )
  c.model.moe.update({"num_experts": X, "expert_dim": F, **moe})
  return config_lib.parse(c)


def make_layer(model, seed=0):
  """(layer, params, x_BTD, segment_BT), every matrix of deviation 1 / 3."""
  layer = moe_lib.Moe(model)
  random = np.random.default_rng(seed)
  normal = lambda shape: random.normal(size=shape).astype(np.float32)
  x_BTD = normal((B, T, D))
  segment_BT = jnp.ones((B, T), jnp.int32)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x_BTD, segment_BT)
  params = {
    name: normal(x.shape) / 3 for name, x in nn.unbox(shapes)["params"].items()
  }
  return layer, params, x_BTD, segment_BT


@functools.partial(jax.jit, static_argnames="model")
def loop_over_experts(params, x_BTD, model):
  """The layer from its definition: every expert applied to every token."""
  logits_BTX = jnp.einsum("BTD,DX->BTX", x_BTD, params["router"])
  probability_BTX = jnp.exp(logits_BTX)
  probability_BTX /= probability_BTX.sum(-1, keepdims=True)
  rank_BTX = jnp.argsort(jnp.argsort(-probability_BTX))
  weight_BTX = jnp.where(rank_BTX < model.moe.top_k, probability_BTX, 0)
  if model.moe.top_k > 1:
    weight_BTX /= weight_BTX.sum(-1, keepdims=True)
  y_BTD = jnp.zeros_like(x_BTD)
  for expert in range(model.moe.num_experts):
    h_BTF = x_BTD @ params["experts_up"][expert]
    if model.activation == "swiglu":
      h_BTF *= jax.nn.silu(x_BTD @ params["experts_gate"][expert])
    else:
      h_BTF = jax.nn.gelu(h_BTF)
    y_BTD += weight_BTX[..., expert, None] * (
      h_BTF @ params["experts_down"][expert]
    )
  return y_BTD


@pytest.mark.parametrize(
  "activation, top_k", [("gelu", 1), ("gelu", 2), ("gelu", X), ("swiglu", 4)]
)
def test_equals_a_loop_over_experts_in_value_and_gradient(activation, top_k):
  model = make_config(activation, top_k=top_k).model
  layer, params, x_BTD, segment_BT = make_layer(model)
  cotangent_BTD = np.random.default_rng(9).normal(size=x_BTD.shape)

  def value_and_gradient(function):
    def loss(params, x_BTD):
      y_BTD = function(params, x_BTD)
      return (y_BTD * cotangent_BTD).sum(), y_BTD

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    gradients, y_BTD = gradient(params, x_BTD)
    return y_BTD, gradients

  actual = value_and_gradient(
    lambda params, x: layer.apply({"params": params}, x, segment_BT)
  )
  expected = value_and_gradient(
    functools.partial(loop_over_experts, model=model)
  )
  assert_close(actual, expected)
  assert all(abs(g).max() > 0 for g in jax.tree.leaves(expected[1]))


def test_bfloat16_routes_in_float32():
  model = make_config(dtype="bfloat16", top_k=1).model
  layer, params, x_BTD, segment_BT = make_layer(model)
  x_BTD = (abs(x_BTD) + 0.1).astype(jnp.bfloat16)
  # Expert 3 leads expert 0 by less than bfloat16 can tell.
  column_D = abs(params["router"][:, 0]).astype(jnp.bfloat16)
  column_D = column_D.astype(np.float32)
  params["router"] = -abs(params["router"])
  params["router"][:, 0] = column_D
  params["router"][:, 3] = column_D * np.float32(1 + 2.0**-12)
  y_BTD = jax.jit(layer.apply)({"params": params}, x_BTD, segment_BT)
  assert y_BTD.dtype == jnp.bfloat16
  expected_BTD = loop_over_experts(params, x_BTD.astype(np.float32), model)
  assert_close(y_BTD, expected_BTD, "bfloat16")


@pytest.mark.parametrize("top_k", [1, 2])
def test_no_token_is_lost_under_the_most_skewed_routing(top_k):
  model = make_config(top_k=top_k).model
  layer, params, x_BTD, segment_BT = make_layer(model)
  x_BTD = abs(x_BTD) + 0.1
  # Every token prefers expert 4, then expert 1; all others stay empty.
  params["router"] = np.zeros((D, X), np.float32)
  params["router"][:, 4], params["router"][:, 1] = 3 / 4, 2 / 4
  apply = jax.jit(functools.partial(layer.apply, mutable=["losses", "stats"]))
  y_BTD, sown = apply({"params": params}, x_BTD, segment_BT)
  assert_close(y_BTD, loop_over_experts(params, x_BTD, model))
  assert abs(y_BTD).min() > 0
  entropy = sown["stats"]["load_entropy"][0]
  # Two experts share everything, or one has it all.
  assert entropy == pytest.approx(np.log(top_k) / np.log(X), abs=1e-6)


def test_a_tpu_does_not_round_the_logits_of_the_router():
  layer, params, x_BTD, segment_BT = make_layer(make_config().model)
  traced = jax.jit(layer.apply).trace({"params": params}, x_BTD, segment_BT)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  (line,) = (x for x in text.splitlines() if "[HIGHEST, HIGHEST]" in x)
  assert line.endswith(f"-> tensor<{B}x{T}x{X}xf32>")


balance_loss = jax.jit(moe_lib.balance_loss)


def test_balance_loss_is_1_when_balanced_and_x_when_collapsed():
  present_BT = np.ones((2, X), bool)
  uniform_BTX = np.full((2, X, X), 1 / X, np.float32)
  expert_BTY = np.stack([np.arange(X), (np.arange(X) + 1) % X], -1)
  expert_BTY = np.broadcast_to(expert_BTY, (2, X, 2))
  loss, share_X = balance_loss(uniform_BTX, expert_BTY, present_BT)
  assert loss == pytest.approx(1)
  assert_close(share_X, np.full(X, 1 / X))
  collapsed_BTX = np.zeros((2, X, X), np.float32)
  collapsed_BTX[..., 2] = 1
  loss, share_X = balance_loss(collapsed_BTX, np.full((2, X, 1), 2), present_BT)
  assert loss == pytest.approx(X)
  assert_close(share_X, np.eye(X)[2])


def test_balance_loss_by_hand_without_padding():
  # Three tokens of X = 2 experts, top 1; the last is padding.
  probability_BTX = np.array([[[0.9, 0.1], [0.4, 0.6], [0.0, 1.0]]], np.float32)
  expert_BTY = np.array([[[0], [1], [1]]])
  present_BT = np.array([[True, True, False]])
  loss, share_X = balance_loss(probability_BTX, expert_BTY, present_BT)
  assert_close(share_X, np.array([0.5, 0.5]))
  assert loss == pytest.approx(2 * (0.5 * 0.65 + 0.5 * 0.35))
  probability_BTX = np.array([[[0.9, 0.1], [0.8, 0.2], [0.0, 1.0]]], np.float32)
  expert_BTY = np.array([[[0], [0], [1]]])
  loss, _ = balance_loss(probability_BTX, expert_BTY, present_BT)
  assert loss == pytest.approx(2 * 1.0 * 0.85)
  absent_BT = np.zeros((1, 3), bool)
  loss, _ = balance_loss(probability_BTX, expert_BTY, absent_BT)
  assert loss == 0


def test_descending_the_balance_loss_balances():
  model = make_config(top_k=2).model
  layer, params, x_BTD, segment_BT = make_layer(model, seed=3)
  params["router"][:, 0] += x_BTD.mean((0, 1)) * 4

  def loss(params, x_BTD):
    _, sown = layer.apply(
      {"params": params}, x_BTD, segment_BT, mutable=["losses", "stats"]
    )
    return sown["losses"]["balance"][0], sown["stats"]["load_entropy"][0]

  value_and_gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
  (before, entropy_before), gradient = value_and_gradient(params, x_BTD)
  for _ in range(50):
    params = jax.tree.map(lambda p, g: p - 30 * np.asarray(g), params, gradient)
    (after, entropy_after), gradient = value_and_gradient(params, x_BTD)
  assert after < before
  assert entropy_after > entropy_before


def test_training_adds_the_weighted_loss_of_every_block():
  metrics = {}
  state = testing.random_state(make_config())
  for weight in (0.0, 0.01):
    run = make_config(balance_loss_weight=weight)
    batch = jax.tree.map(
      lambda x: np.ones(x.shape, x.dtype), step.abstract_batch(run)
    )
    batch["tokens"] = np.random.default_rng(0).integers(0, 32, (4, 8), np.int32)
    total, aux = step.jitted(step.loss_fn, run)(
      state.variables(), batch, jax.random.key(0), 32.0
    )
    assert_close(total, sum(aux["losses"].values()))
    metrics[weight] = {**aux["losses"], **aux["stats"]}
  assert metrics[0.0]["auxiliary_loss"] == 0
  # Two blocks, each at least 1 (perfect balance) times the weight.
  assert 0.02 * 0.99 <= metrics[0.01]["auxiliary_loss"] < 0.02 * X
  assert metrics[0.0]["loss"] == metrics[0.01]["loss"]
  for name in ("block_0/moe/load_entropy", "block_1/moe/top_weight"):
    assert 0 < metrics[0.01][name] <= 1


def test_experts_replace_the_mlp_of_every_block():
  model = make_config().model
  shapes = jax.eval_shape(
    Transformer(model).init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32)
  )["params"]
  for block in range(2):
    assert "mlp" not in shapes[f"block_{block}"]
    assert set(shapes[f"block_{block}"]["moe"]) == {
      "router",
      "experts_up",
      "experts_down",
    }


@pytest.mark.parametrize(
  "field,value,message",
  [
    ("top_k", 7, "model.moe.top_k = 7: must be at most num_experts = 6"),
    ("top_k", 0, "model.moe.top_k = 0: must be at least 1"),
    ("expert_dim", 0, "model.moe.expert_dim = 0: must be at least 1"),
    ("num_experts", -1, "model.moe.num_experts = -1: must be at least 0"),
    (
      "balance_loss_weight",
      -0.1,
      "model.moe.balance_loss_weight = -0.1: must be at least 0",
    ),
  ],
)
def test_bad_settings_are_refused(field, value, message):
  with pytest.raises(ConfigError) as error:
    make_config(**{field: value})
  assert str(error.value) == message
