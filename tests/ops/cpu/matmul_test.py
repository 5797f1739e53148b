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
  random = np.random.default_rng(0)
  return tuple(
    random.normal(size=shape).astype(dtype)
    for shape in ((B, rows, D), (B, F, D))
  )


@pytest.mark.parametrize("rows", [1, 5, matmul.FEW_ROWS + 1])
def test_equals_the_product(rows, platform):
  del platform
  x_BTD, weight_BFD = make(rows, "float32")
  expected_BTF = x_BTD @ weight_BFD.swapaxes(1, 2)
  # A fresh function: jit must not reuse the form of another platform.
  dot = jax.jit(lambda *inputs: matmul.dot_transposed(*inputs))
  actual_BTF = dot(x_BTD, weight_BFD)
  assert_close(actual_BTF, expected_BTF)


def test_bfloat16_is_summed_in_the_dtype_asked_for():
  inputs = make(3, jnp.bfloat16)
  x_BTD, weight_BFD = (x.astype(np.float64) for x in inputs)
  exact_BTF = x_BTD @ weight_BFD.swapaxes(1, 2)
  dot = jax.jit(matmul.dot_transposed, static_argnums=2)
  assert_close(dot(*inputs, jnp.float32), exact_BTF)
  rounded_BTF = dot(*inputs)
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
