"""The transformer without memory: against a slow one in numpy."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import numpy_model
from tests.small_model import (
  TOKENS,
  B,
  T,
  apply,
  apply_block,
  dense_config,
  variables_of,
)
from ultramem_jax.layers.mlp import Mlp
from ultramem_jax.testing import assert_close


@pytest.mark.parametrize(
  "overrides",
  [
    dict(),
    dict(norm_bias=True, rope_theta=100.0),
    dict(norm="rms", activation="swiglu", qk_norm="head", tie_embeddings=True),
    dict(mlp_conv=3),
    dict(mlp_conv=2, mlp_conv_blocks="2"),
    dict(adapter_dim=12, adapter_blocks="2", activation="swiglu"),
  ],
  ids=str,
)
def test_dense_model_is_the_slow_one(overrides):
  c = dense_config(**overrides)
  variables = variables_of(c)
  assert set(variables) == {"params"}
  logits_BTV = apply(c, variables, TOKENS)
  assert logits_BTV.shape == (B, T, c.vocab_size)
  assert logits_BTV.dtype == jnp.float32
  for logits_TV, tokens_T in zip(logits_BTV, TOKENS, strict=True):
    assert_close(logits_TV, numpy_model.dense(c, variables["params"], tokens_T))


@pytest.mark.parametrize("taps", [0, 3])
def test_a_block_returns_what_its_mlp_read(taps):
  """The normalized residual stream after attention: what a memory reads."""
  c = dense_config(mlp_conv=taps)
  params = variables_of(c)["params"]["block_0"]
  x_BTD = np.random.default_rng(0).normal(size=(B, T, c.embed_dim))
  _, h_BTD = apply_block(c, params, x_BTD.astype(np.float32), taps)
  params = jax.tree.map(np.float64, params)
  for h_TD, x_TD in zip(h_BTD, x_BTD, strict=True):
    read_TD = numpy_model.norm(c, params["attention_norm"], x_TD)
    x_TD = x_TD + numpy_model.attention(c, params["attention"], read_TD)
    expected_TD = numpy_model.norm(c, params["mlp_norm"], x_TD)
    if taps:
      expected_TD = numpy_model.convolution(params["mlp_conv"], expected_TD)
    assert_close(h_TD, expected_TD)


def test_a_new_adapter_adds_nothing_until_it_learns():
  c = dense_config(adapter_dim=12)
  adapter = Mlp(c, adapter_dim=c.adapter_dim)
  x_BTD = np.random.default_rng(0).normal(size=(B, T, c.embed_dim))
  variables = nn.unbox(adapter.init(jax.random.key(0), x_BTD))

  def error(params):
    return ((adapter.apply({"params": params}, x_BTD) - 1) ** 2).sum()

  assert error(variables["params"]) == x_BTD.size
  gradients = jax.grad(error)(variables["params"])
  assert gradients["down"]["kernel"].any()


def test_only_the_named_blocks_convolve():
  c = dense_config(num_layers=4, mlp_conv=2, mlp_conv_blocks="3/1")
  params = variables_of(c)["params"]
  convolved = {name for name in params if "mlp_conv" in params[name]}
  assert convolved == {"block_0", "block_2"}
  assert params["block_0"]["mlp_conv"]["kernel"].shape == (2, c.embed_dim)


def test_dense_blocks_have_12_d_squared_parameters():
  c = dense_config(embed_dim=32, mlp_dim=128)
  for layer in range(c.num_layers):
    kernels = [
      x.size
      for x in jax.tree.leaves(variables_of(c)["params"][f"block_{layer}"])
      if x.ndim > 1
    ]
    assert sum(kernels) == 12 * 32**2
