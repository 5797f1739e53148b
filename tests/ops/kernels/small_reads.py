"""Reads of a small table, by a kernel and by the slow form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.ops import lookup
from ultramem_jax.ops.kernels import pallas
from ultramem_jax.testing import assert_close

ROWS, WIDTH = 14, 256


def random_inputs(tokens, pools, cores, width=WIDTH, reads=5):
  random = np.random.default_rng(0)
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  index_BTY = random.integers(
    pools * ROWS, size=(*tokens, reads), dtype=np.int32
  )
  index_BTY[..., 1] = index_BTY[..., 0]  # read twice
  return draw(ROWS, width), index_BTY, draw(*tokens, reads, cores)


def pooled_and_gradient(function, inputs, pools):
  table_IW, index_BTY, score_BTYC = inputs

  def loss(table_IW, score_BTYC):
    pooled_BTEW = function(table_IW, index_BTY, score_BTYC, pools)
    return jnp.sin(pooled_BTEW).sum(), pooled_BTEW

  return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(table_IW, score_BTYC)


def assert_equals_the_reference(inputs, pools):
  assert_close(
    pooled_and_gradient(
      functools.partial(lookup.pool_rows, kernels=pallas.KERNELS), inputs, pools
    ),
    pooled_and_gradient(lookup.pool_rows_reference, inputs, pools),
  )
