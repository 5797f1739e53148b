"""PEER against its definition: every expert scored and run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from ultramem_jax import testing
from ultramem_jax.layers.peer import Peer
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.memory import MemoryConfig
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import accounting

B, T, D, N, M = 2, 5, 12, 6, 4
SETTINGS = dict(
  kind="peer",
  num_keys=N,
  key_dim=7,
  value_dim=D,
  top_m=M,
  num_heads=3,
  heads_per_query=1,
  score="sum",
  softmax=True,
  num_cores=1,
  expansion=1,
  shuffle="none",
  value_projection=False,
  query_conv=0,
  init="official",
)


def make_layer(**settings):
  """(layer, variables, x_BTD): parameters of deviation 1 / 2."""
  layer = Peer(MemoryConfig(**{**SETTINGS, **settings}), embed_dim=D)
  random = np.random.default_rng(0)
  normal = lambda shape: random.normal(size=shape).astype(np.float32)
  x_BTD = normal((B, T, D))
  shapes = nn.unbox(jax.eval_shape(layer.init, jax.random.key(1), x_BTD))
  params = jax.tree.map(lambda x: normal(x.shape) / 2, shapes["params"])
  return layer, {"params": params}, x_BTD


def standardize(x):
  mean = x.mean(-1, keepdims=True)
  variance = ((x - mean) ** 2).mean(-1, keepdims=True)
  return (x - mean) / jnp.sqrt(variance + 1e-5)


def peer_reference(params, x_BTD):
  """All N * N experts scored and run; all but each head's best M masked."""
  query = jnp.einsum("BTD,DPAK->PBTAK", x_BTD, params["query"][..., 0, :])
  query = standardize(query) * jnp.reshape(
    params["query_norm"]["scale"], (1, 1, 1, 1, -1)
  )
  keys = standardize(params["keys"][:, :, 0]) * jnp.reshape(
    params["key_norm"]["scale"], (1, 1, 1, -1)
  )
  side = jnp.einsum("PBTAK,PANK->PBTAN", query, keys)
  score_BTAI = (side[0][..., :, None] + side[1][..., None, :]).reshape(
    B, T, 3, N * N
  )
  rank_BTAI = jnp.argsort(jnp.argsort(-score_BTAI))
  gate_BTAI = jax.nn.softmax(jnp.where(rank_BTAI < M, score_BTAI, -jnp.inf))
  hidden_BTI = jax.nn.gelu(x_BTD @ params["down_values"].T)
  return jnp.einsum(
    "BTAI,BTI,ID->BTD", gate_BTAI, hidden_BTI, params["up_values"]
  )


def test_equals_the_definition_in_value_and_gradient():
  layer, variables, x_BTD = make_layer()
  cotangent_BTD = np.random.default_rng(5).normal(size=x_BTD.shape)

  def value_and_gradient(function):
    def loss(params, x_BTD):
      y_BTD = function(params, x_BTD)
      return (y_BTD * cotangent_BTD).sum(), y_BTD

    gradient = jax.jit(jax.grad(loss, (0, 1), has_aux=True))
    return gradient(variables["params"], x_BTD)

  actual = value_and_gradient(
    lambda params, x_BTD: layer.apply({"params": params}, x_BTD)
  )
  expected = value_and_gradient(peer_reference)
  assert_close(actual, expected)
  gradients = expected[0][0]
  assert all(abs(g).max() > 0 for g in jax.tree.leaves(gradients))


def test_unread_experts_get_no_gradient():
  layer, variables, x_BTD = make_layer()

  def loss(params):
    y_BTD, sown = layer.apply(
      {"params": params}, x_BTD, mutable=["intermediates"]
    )
    return (y_BTD**2).sum(), sown["intermediates"]

  gradients, sown = jax.jit(jax.grad(loss, has_aux=True))(variables["params"])
  read = np.unique(sown["slot_BTAM"][0])
  assert 0 < read.size < N * N
  unread = np.setdiff1d(np.arange(N * N), read)
  for table in ("down_values", "up_values"):
    assert (gradients[table][unread] == 0).all()
    assert (abs(gradients[table][read]).max(-1) > 0).all()


def peer_run(**overrides):
  return testing.small_config(
    **{
      **{f"model__memory__{name}": v for name, v in SETTINGS.items()},
      "model__memory__value_dim": 16,
      **overrides,
    }
  )


def test_accounting_reads_both_tables():
  model = peer_run().model
  assert accounting.parameters(model)["sparse"] == 2 * N * N * 16
  flops = accounting.flops_per_token(model)["memory.values"]
  assert flops == 2 * 3 * M * 2 * 16
  mlp = 2 * 2 * 16 * 32
  assert accounting.memory_access(model, 2) == mlp + 2 * 3 * M * 2 * 16
  assert accounting.memory_access(model, 99) == mlp + 2 * N * N * 16


@pytest.mark.parametrize(
  ("settings", "message"),
  [
    (dict(value_projection=True), "value_projection = True: must be False"),
    (dict(num_cores=2, score="tucker"), "num_cores = 2: must be 1"),
    (dict(expansion=4, shared_projection=True), "expansion = 4: must be 1"),
  ],
)
def test_bad_settings_are_refused(settings, message):
  with pytest.raises(ConfigError, match=message):
    MemoryConfig(**{**SETTINGS, **settings})
