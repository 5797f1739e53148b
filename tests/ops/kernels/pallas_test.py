"""The lookup kernels of GPUs and TPUs, interpreted, against the slow form.

What the compilers make of them: `gpu_program_test.py`, `tpu_program_test.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.kernels.small_reads import (
  ROWS,
  WIDTH,
  assert_equals_the_reference,
  random_inputs,
)
from ultramem_jax.ops import lookup
from ultramem_jax.ops.kernels import pallas
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close


# Fewer tokens than a step of the TPU's grid has, and some more.
@pytest.mark.parametrize(
  "tokens, pools, cores", [((1, 3), 4, 2), ((2, 20), 4, 1), ((1, 3), 1, 2)]
)
def test_pooled_rows_equal_the_reference(kernel, tokens, pools, cores):
  assert_equals_the_reference(random_inputs(tokens, pools, cores), pools)


def test_dots_with_rows_equal_the_reference(kernel):
  table_IW, index_BTY, _ = random_inputs((2, 4), 1, 1)
  random = np.random.default_rng(1)
  x_BTW = random.normal(size=(2, 4, WIDTH)).astype(np.float32)

  def both(function):
    def loss(table_IW, x_BTW):
      dot_BTY = function(table_IW, index_BTY, x_BTW)
      return jnp.sin(dot_BTY).sum(), dot_BTY

    return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(table_IW, x_BTW)

  assert_close(
    both(functools.partial(lookup.dot_rows, kernels=pallas.KERNELS)),
    both(lookup.dot_rows_reference),
  )


def test_rows_that_no_token_reads_do_not_count(kernel):
  """Not even at the places of a tile, or a step, that no read fills."""
  table_IW, index_BTY, score_BTYC = random_inputs((1, 3), 4, 2)
  index_BTY[index_BTY % ROWS == 0] = 1
  table_IW[0] = np.nan

  @jax.jit
  def pooled_and_dots(score_BTYC):
    pooled_BTEW, dots = jax.vjp(
      lambda score_BTYC: lookup.pool_rows(
        table_IW, index_BTY, score_BTYC, 4, pallas.KERNELS
      ),
      score_BTYC,
    )
    return pooled_BTEW, dots(pooled_BTEW)

  for array in jax.tree.leaves(pooled_and_dots(score_BTYC)):
    assert np.isfinite(array).all()


@pytest.mark.parametrize(
  "backend, table_IW",
  [
    ("cpu", np.zeros((ROWS, 128), np.int8)),
    ("gpu", np.zeros((ROWS, 128), np.int8)),
    ("tpu", np.zeros((ROWS, 128), np.int8)),
    ("tpu", np.zeros((ROWS, 128), np.float32)),  # 64 columns a core
    ("tpu", np.zeros((ROWS, 256), np.uint16)),
  ],
)
def test_tables_that_it_does_not_take_are_refused(
  monkeypatch, backend, table_IW
):
  _, index_BTY, score_BTYC = random_inputs((1, 2), 1, 2)
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  with pytest.raises(ConfigError, match=r"storage\.kernel = 'pallas'"):
    lookup.pool_rows(table_IW, index_BTY, score_BTYC, 1, pallas.KERNELS)


def test_other_platforms_do_not_take_it():
  inputs = random_inputs((1, 3), 4, 2)
  compiled = jax.jit(lookup.pool_rows, static_argnums=(3, 4))
  assert_close(compiled(*inputs, 4, pallas.KERNELS), compiled(*inputs, 4))
