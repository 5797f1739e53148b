"""Keys, and the norm of them that queries do."""

import dataclasses

import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.layers import numpy_layer
from tests.layers.small_layer import SMALL
from ultramem_jax.layers.keys import KeyNorm
from ultramem_jax.testing import assert_close


@pytest.mark.parametrize("kind", ["layernorm", "rms"])
def test_queries_do_the_norm_of_keys(kind):
  """<query, norm(key)>, and its gradients, without normalized keys."""
  norm = KeyNorm(kind, 1e-5, False, 7, nn.initializers.normal(1.0))
  random = np.random.default_rng(0)
  query_BK, keys_NK = (
    random.normal(1, 2, size=(length, 7)).astype(np.float32)
    for length in (3, 5)
  )
  cotangent_BN = random.normal(size=(3, 5))
  variables = nn.unbox(norm.init(jax.random.key(0), keys_NK))

  def normalized(norm, query_BK, keys_NK):
    return query_BK @ norm(keys_NK).T

  def folded(norm, query_BK, keys_NK):
    return (norm.fold(query_BK) @ keys_NK.T) * norm.inverse_std(keys_NK)[None]

  def value_and_gradient(method):
    def loss(*inputs):
      score_BN = norm.apply(*inputs, method=method)
      return (score_BN * cotangent_BN).sum(), score_BN

    gradient = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))
    return gradient(variables, query_BK, keys_NK)

  gradient, score_BN = value_and_gradient(folded)
  weight_K = np.asarray(variables["params"]["scale"])
  settings = dataclasses.replace(SMALL, query_key_norm=kind)
  assert_close(
    score_BN, query_BK @ numpy_layer.norm(settings, weight_K, keys_NK).T
  )
  assert_close((gradient, score_BN), value_and_gradient(normalized))
