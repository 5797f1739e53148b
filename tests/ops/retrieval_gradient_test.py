"""The gradient of chosen scores, against JAX's own of their definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import retrieval_gradient
from ultramem_jax.testing import assert_close

B, T, G, J, R, N, K, M = 2, 3, 2, 2, 2, 6, 4, 3


def chosen_scores(query_BTPGRK, keys_PGJRNK, scale_PGJRN, index_BTPAM):
  score = jnp.einsum("BTPGRK,PGJRNK->BTPGJRN", query_BTPGRK, keys_PGJRNK)
  if scale_PGJRN is not None:
    score *= scale_PGJRN[None, None]
  score_BTPARN = score.reshape(B, T, 2, G * J, R, N)
  return jnp.take_along_axis(score_BTPARN, index_BTPAM[:, :, :, :, None], -1)


@pytest.mark.parametrize("has_scale", [False, True])
def test_equals_the_gradient_of_the_definition(has_scale, platform):
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  query_BTPGRK, keys_PGJRNK = draw(B, T, 2, G, R, K), draw(2, G, J, R, N, K)
  scale_PGJRN = 2 + draw(2, G, J, R, N) if has_scale else None
  # A key is chosen by several cells, too.
  index_BTPAM = jnp.asarray(rng.integers(0, N, (B, T, 2, G * J, M)), jnp.int32)
  gradient_BTPARM = draw(B, T, 2, G * J, R, M)
  # A function of its own: jit would know one that the other platform traced.
  actual = jax.jit(lambda *args: retrieval_gradient.gradients(*args))(
    query_BTPGRK, keys_PGJRNK, scale_PGJRN, index_BTPAM, gradient_BTPARM
  )
  _, pullback = jax.vjp(
    lambda *x: chosen_scores(*x, index_BTPAM),
    query_BTPGRK,
    keys_PGJRNK,
    scale_PGJRN,
  )
  assert_close(actual, pullback(gradient_BTPARM))
