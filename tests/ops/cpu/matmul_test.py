"""Products of few rows: the same numbers, the matrix on a CPU's left side."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops.cpu import matmul
from ultramem_jax.testing import assert_close

B, F, D = 2, 37, 11


def make(rows, dtype):
  keys = jax.random.split(jax.random.key(0))
  x_BTD = jax.random.normal(keys[0], (B, rows, D), dtype)
  return x_BTD, jax.random.normal(keys[1], (B, F, D), dtype)


@pytest.mark.parametrize("rows", [1, 5, matmul.FEW_ROWS + 1])
def test_equals_the_product(rows, platform):
  del platform
  x_BTD, weight_BFD = make(rows, "float32")
  expected_BTF = np.asarray(x_BTD) @ np.asarray(weight_BFD).swapaxes(1, 2)
  actual_BTF = matmul.dot_transposed(x_BTD, weight_BFD)
  assert_close(actual_BTF, expected_BTF)


def test_bfloat16_is_summed_in_the_dtype_asked_for():
  x_BTD, weight_BFD = make(3, "bfloat16")
  exact_BTF = np.asarray(x_BTD, np.float64) @ np.asarray(
    weight_BFD, np.float64
  ).swapaxes(1, 2)
  assert_close(matmul.dot_transposed(x_BTD, weight_BFD, jnp.float32), exact_BTF)
  rounded_BTF = matmul.dot_transposed(x_BTD, weight_BFD)
  assert rounded_BTF.dtype == jnp.bfloat16
  assert_close(rounded_BTF, exact_BTF, "bfloat16")


@pytest.mark.parametrize("rows", [5, matmul.FEW_ROWS + 1])
def test_a_cpu_has_the_matrix_on_the_left_of_few_rows(rows):
  text = (
    jax.jit(matmul.dot_transposed)
    .lower(*make(rows, "float32"))
    .compile()
    .as_text()
  )
  shapes = set(re.findall(rf"f32\[{B},(\d+),(\d+)\]\S* dot\(", text))
  few = rows <= matmul.FEW_ROWS
  assert shapes == {(str(F), str(rows)) if few else (str(rows), str(F))}
