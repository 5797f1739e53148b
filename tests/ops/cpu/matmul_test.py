"""Products of few rows: the same numbers, the matrix on a CPU's left side."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops.cpu import matmul as few_rows
from ultramem_jax.testing import assert_close

Z, N, K = 2, 37, 11


def make(rows, dtype):
  keys = jax.random.split(jax.random.key(0))
  x_ZLK = jax.random.normal(keys[0], (Z, rows, K), dtype)
  return x_ZLK, jax.random.normal(keys[1], (Z, N, K), dtype)


@pytest.mark.parametrize("rows", [1, 5, few_rows.FEW_ROWS + 1])
def test_equals_the_product(rows, platform):
  del platform
  x_ZLK, weight_ZNK = make(rows, "float32")
  expected_ZLN = np.asarray(x_ZLK) @ np.asarray(weight_ZNK).swapaxes(1, 2)
  actual_ZLN = few_rows.dot_transposed(x_ZLK, weight_ZNK)
  assert_close(actual_ZLN, expected_ZLN)


def test_bfloat16_is_summed_in_the_dtype_asked_for():
  x_ZLK, weight_ZNK = make(3, "bfloat16")
  exact_ZLN = np.asarray(x_ZLK, np.float64) @ np.asarray(
    weight_ZNK, np.float64
  ).swapaxes(1, 2)
  assert_close(
    few_rows.dot_transposed(x_ZLK, weight_ZNK, jnp.float32), exact_ZLN
  )
  rounded_ZLN = few_rows.dot_transposed(x_ZLK, weight_ZNK)
  assert rounded_ZLN.dtype == jnp.bfloat16
  assert_close(rounded_ZLN, exact_ZLN, "bfloat16")


@pytest.mark.parametrize("rows", [5, few_rows.FEW_ROWS + 1])
def test_a_cpu_has_the_matrix_on_the_left_of_few_rows(rows):
  text = (
    jax.jit(few_rows.dot_transposed)
    .lower(*make(rows, "float32"))
    .compile()
    .as_text()
  )
  shapes = set(re.findall(rf"f32\[{Z},(\d+),(\d+)\]\S* dot\(", text))
  few = rows <= few_rows.FEW_ROWS
  assert shapes == {(str(N), str(rows)) if few else (str(rows), str(N))}
