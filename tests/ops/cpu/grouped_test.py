"""The grouped matmul against a loop over its groups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops.cpu import grouped
from ultramem_jax.testing import assert_close

D, F = 12, 10
# Fewer rows than groups; groups of many chunks, of one row, and empty ones.
SIZES = [(0, 1, 0, 0, 1, 0), (3, 0, 21, 1, 0, 5), (0, 0, 40), (300, 1, 0)]


def make_inputs(size_X, dtype=np.float32):
  random = np.random.default_rng(0)
  return tuple(
    random.normal(size=shape).astype(dtype)
    for shape in ((sum(size_X), D), (len(size_X), D, F), (sum(size_X), F))
  )


grouped_dot = jax.jit(grouped.grouped_dot)


@functools.partial(jax.jit, static_argnums=2)
def reference(x_ZD, weight_XDF, size_X):
  stop_X = np.cumsum(size_X)
  return jnp.concatenate(
    [
      x_ZD[stop - size : stop] @ weight_DF
      for stop, size, weight_DF in zip(stop_X, size_X, weight_XDF, strict=True)
    ]
  )


@pytest.mark.parametrize("size_X", SIZES)
def test_equals_a_loop_over_groups_in_value_and_gradient(size_X):
  *inputs, cotangent_ZF = make_inputs(size_X)

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_gradient(function, size_X, *inputs):
    y_ZF, pullback = jax.vjp(lambda *x: function(*x, size_X), *inputs)
    return y_ZF, pullback(cotangent_ZF)

  arguments = (np.array(size_X), *inputs)
  assert_close(
    value_and_gradient(grouped.grouped_dot, *arguments),
    value_and_gradient(lambda x, w, _: reference(x, w, size_X), *arguments),
  )


def test_bfloat16():
  x_ZD, weight_XDF, _ = make_inputs(SIZES[1], jnp.bfloat16)
  y_ZF = grouped_dot(x_ZD, weight_XDF, np.array(SIZES[1]))
  assert y_ZF.dtype == jnp.bfloat16
  wide = (x.astype(np.float32) for x in (x_ZD, weight_XDF))
  assert_close(y_ZF, reference(*wide, SIZES[1]), "bfloat16")


def test_a_cpu_reads_no_matrix_of_an_empty_group():
  size_X = SIZES[1]
  x_ZD, weight_XDF, _ = make_inputs(size_X)
  expected_ZF = np.asarray(reference(x_ZD, weight_XDF, size_X))
  weight_XDF[np.array(size_X) == 0] = np.nan
  assert_close(grouped_dot(x_ZD, weight_XDF, np.array(size_X)), expected_ZF)
