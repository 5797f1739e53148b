"""What a layer's initialization draws."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax import MemoryConfig, UltraMem

# Large enough for statistics.
LARGE = MemoryConfig(num_keys=32, key_dim=16, value_dim=32, top_m=16)


@functools.partial(jax.jit, static_argnums=0)
def statistics(layer, keys):
  """Per seed: output variance, mean square score per core, std of values."""

  def one_seed(key):
    init_key, x_key = jax.random.split(key)
    x_BTD = jax.random.normal(x_key, (1, 128, layer.embed_dim))
    variables = nn.unbox(layer.init(init_key, x_BTD))
    y_BTD, sown = layer.apply(variables, x_BTD, mutable=["intermediates"])
    score_BTAMC = sown["intermediates"]["score_BTAMC"][0]
    values_IW = variables["params"]["values"]
    return (y_BTD**2).mean(), (score_BTAMC**2).mean(), values_IW.std()

  return jax.lax.map(one_seed, keys)


@pytest.mark.parametrize(
  "changes",
  [
    dict(),
    dict(num_cores=1),
    dict(score="sum", num_cores=1),
    dict(expansion=1, value_dim=64, value_projection=False),
    dict(shared_projection=True),
  ],
  ids=str,
)
def test_paper_init_gives_variance_1_over_2_layers(changes):
  config = dataclasses.replace(LARGE, **changes)
  layer = UltraMem(config, embed_dim=64, num_layers=3)
  variance, score, value_std = (
    x.mean() for x in statistics(layer, jax.random.split(jax.random.key(0), 16))
  )
  np.testing.assert_allclose(variance, 1 / (2 * 3), rtol=0.15)
  # 256 random queries of a seed know it to about 1 %; its keys' share of the
  # spread is calibrated away.
  np.testing.assert_allclose(score, 1, rtol=0.05)
  c = config
  expected = (c.projections / (2 * c.top_m * c.num_heads * 3)) ** 0.5
  np.testing.assert_allclose(value_std, expected, rtol=0.01)


def large_params(**changes):
  config = dataclasses.replace(LARGE, **changes)
  layer = UltraMem(config, embed_dim=64, num_layers=3)
  init = lambda key: nn.unbox(layer.init(key, jnp.zeros((1, 1, 64))))
  return jax.jit(init)(jax.random.key(0))["params"]


def test_other_paper_init():
  params = large_params()
  np.testing.assert_allclose(params["key_norm"]["scale"], 16**-0.5)
  assert len(np.unique(params["query_norm"]["scale"])) == 1
  std = params["value_projection"].std()
  np.testing.assert_allclose(std, (4 * 32) ** -0.5, rtol=0.05)


def test_official_init():
  params = large_params(init="official")
  for name, std in (
    ("values", 0.02),
    ("keys", 16**-0.5),
    ("query", 16**-0.5),
    ("value_projection", (4 * 32) ** -0.5),
  ):
    # Thousands of samples: the std is known to 1 or 2 %.
    np.testing.assert_allclose(params[name].std(), std, rtol=0.05)
    assert abs(params[name].mean()) < 0.05 * std
  for name in ("query_norm", "key_norm"):
    np.testing.assert_allclose(params[name]["scale"], 16**-0.33, rtol=1e-6)
  core = params["core"]
  assert core.min() >= 0 and core.max() <= 1 and 0.3 < core.mean() < 0.7
