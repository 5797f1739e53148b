"""The lookup kernels of GPUs, interpreted, against the slow form."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.ops.kernels.small_reads import (
  assert_equals_the_reference,
  random_inputs,
)
from ultramem_jax.ops import lookup, precision
from ultramem_jax.ops.kernels import pallas
from ultramem_jax.testing import assert_close


@pytest.mark.parametrize(
  "width, cores, reads",
  [
    (512, 2, 21),  # two tiles of 16 rows, two for each core
    (384, 2, 16),  # of 64 columns
    (6, 3, 3),
  ],
)
def test_tiles_of_the_gpu_cover_any_table(gpu_kernel, width, cores, reads):
  """Powers of 2, which the number of reads and the width need not be."""
  assert_equals_the_reference(
    random_inputs((1, 3), 4, cores, width, reads), pools=4
  )


@pytest.mark.parametrize("as_bits", [False, True])
def test_a_table_of_bfloat16_is_read_as_it_is(gpu_kernel, as_bits):
  table_IW, *others = random_inputs((1, 3), 4, 2)
  stored_IW = table_IW.astype(jnp.bfloat16)
  table_IW = stored_IW.astype(np.float32)
  if as_bits:
    stored_IW = stored_IW.view(np.uint16)
  pool = jax.jit(
    functools.partial(lookup.pool_rows, kernels=pallas.KERNELS),
    static_argnums=3,
  )
  assert_close(
    pool(stored_IW, *others, 4),
    lookup.pool_rows_reference(table_IW, *others, 4),
  )


@pytest.mark.skipif(
  jax.__version_info__ >= (0, 11), reason="needs a GPU from jax 0.11 on"
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint16])
def test_lowers_for_a_gpu_that_is_not_there(dtype):
  """Forward and the gradient of the scores are kernels, and nothing gathers."""
  table_IW, index_BTY, score_BTYC = random_inputs((2, 20), 4, 2)

  def loss(score_BTYC, table_IW):
    return jnp.square(
      lookup.pool_rows(table_IW, index_BTY, score_BTYC, 4, pallas.KERNELS)
    ).sum()

  text = (
    jax.jit(jax.grad(loss))
    .trace(score_BTYC, precision.encode(table_IW, dtype))
    .lower(lowering_platforms=("cuda",))
    .as_text()
  )
  assert text.count("gpu.triton") == 2
  assert "gather" not in text
