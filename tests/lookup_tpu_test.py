"""The TPU's lookup kernel, interpreted, against the slow form.

What the TPU's compiler makes of it: `tpu_program_test.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from jax.experimental import pallas as pl

from ultramem_jax.checks import ConfigError
from ultramem_jax.ops import lookup

ROWS, WIDTH = 14, 256


@pytest.fixture
def on_tpu(monkeypatch):
  """Ops take the branch of a TPU where they have one; kernels interpreted."""
  monkeypatch.setattr(
      jax.lax, "platform_dependent",
      lambda *args, default, tpu=None, **_: (tpu or default)(*args),
  )
  monkeypatch.setattr(
      pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)
  )


def random_inputs(tokens, blocks, cores):
  random = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(random.normal(size=shape), jnp.float32)
  index_BTK = random.integers(blocks * ROWS, size=(*tokens, 5), dtype=np.int32)
  index_BTK[..., 1] = index_BTK[..., 0]  # read twice
  return draw(ROWS, WIDTH), jnp.asarray(index_BTK), draw(*tokens, 5, cores)


# Fewer tokens than a step of the grid has, and some more.
@pytest.mark.parametrize("tokens, blocks, cores", [
    ((1, 3), 4, 2), ((2, 20), 4, 1), ((1, 3), 1, 2),
])
def test_pooled_rows_equal_the_reference(on_tpu, tokens, blocks, cores):
  table_IW, index_BTK, score_BTKC = random_inputs(tokens, blocks, cores)

  def both(function):
    def loss(table_IW, score_BTKC):
      pooled_BTEW = function(table_IW, index_BTK, score_BTKC, blocks)
      return jnp.sin(pooled_BTEW).sum(), pooled_BTEW

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(table_IW, score_BTKC)

  assert_close(
      both(functools.partial(lookup.pool_rows, kernel="pallas")),
      both(lookup.pool_rows_reference),
  )


def test_dots_with_rows_equal_the_reference(on_tpu):
  table_IW, index_BTK, _ = random_inputs((2, 4), 1, 1)
  x_BTW = jnp.asarray(
      np.random.default_rng(1).normal(size=(2, 4, WIDTH)), jnp.float32
  )

  def both(function):
    def loss(table_IW, x_BTW):
      dot_BTK = function(table_IW, index_BTK, x_BTW)
      return jnp.sin(dot_BTK).sum(), dot_BTK

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(table_IW, x_BTW)

  assert_close(
      both(functools.partial(lookup.dot_rows, kernel="pallas")),
      both(lookup.dot_rows_reference),
  )


@pytest.mark.parametrize("table_IW, cores", [
    (np.zeros((ROWS, 64), np.float32), 1),
    (np.zeros((ROWS, 128), np.float32), 2),
    (np.zeros((ROWS, 128), np.uint16), 1),
])
def test_tables_that_it_does_not_take_are_refused(table_IW, cores):
  _, index_BTK, score_BTKC = random_inputs((1, 2), 1, cores)
  with pytest.raises(ConfigError, match=r"model\.memory\.kernel = 'pallas'"):
    lookup.pool_rows(table_IW, index_BTK, score_BTKC, 1, "pallas")


def test_other_platforms_do_not_take_it():
  table_IW, index_BTK, score_BTKC = random_inputs((1, 3), 4, 2)
  compiled = jax.jit(lookup.pool_rows, static_argnums=(3, 4))
  assert_close(
      compiled(table_IW, index_BTK, score_BTKC, 4, "pallas"),
      compiled(table_IW, index_BTK, score_BTKC, 4),
  )
