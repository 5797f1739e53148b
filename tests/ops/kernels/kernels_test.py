"""The lookup kernels of GPUs and TPUs, interpreted, against the slow form.

What the compilers make of them: `gpu_program_test.py`, `tpu_program_test.py`.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from ultramem_jax.ops import lookup, precision
from ultramem_jax.ops.kernels import pallas
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close

ROWS, WIDTH = 14, 256


def interpret(monkeypatch, platform):
  """Ops take this platform's branch if they have one; kernels interpreted."""
  monkeypatch.setattr(
    jax.lax,
    "platform_dependent",
    lambda *args, default, **branches: branches.get(platform, default)(*args),
  )
  monkeypatch.setattr(
    pl, "pallas_call", functools.partial(pl.pallas_call, interpret=True)
  )


@pytest.fixture(params=["cuda", "tpu"])
def kernel(request, monkeypatch):
  interpret(monkeypatch, request.param)


@pytest.fixture
def gpu_kernel(monkeypatch):
  interpret(monkeypatch, "cuda")


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


# Fewer tokens than a step of the TPU's grid has, and some more.
@pytest.mark.parametrize(
  "tokens, pools, cores", [((1, 3), 4, 2), ((2, 20), 4, 1), ((1, 3), 1, 2)]
)
def test_pooled_rows_equal_the_reference(kernel, tokens, pools, cores):
  assert_equals_the_reference(random_inputs(tokens, pools, cores), pools)


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
