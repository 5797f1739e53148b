"""Products in another order on a CPU: the same numbers, in the form meant."""

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


WIDE = matmul.ROW_BYTES // 4  # float32


@pytest.mark.parametrize("width", [WIDE, WIDE + 1])
def test_a_gradient_is_the_product(width, platform):
  del platform
  random = np.random.default_rng(0)
  x_TD, y_TF = (
    random.normal(size=shape).astype(np.float32)
    for shape in ((5, width), (5, 2 * WIDE))
  )
  actual_DF = jax.jit(lambda *inputs: matmul.sum_of_outer(*inputs))(x_TD, y_TF)
  assert_close(actual_DF, x_TD.T @ y_TF)


@pytest.mark.parametrize(
  ("widths", "dtype", "is_copied"),
  [
    ((WIDE, 3 * WIDE), "float32", True),
    ((3 * WIDE, WIDE), "float32", False),
    ((2 * WIDE, 4 * WIDE), "bfloat16", True),
    ((WIDE, 2 * WIDE), "bfloat16", False),
    ((WIDE, WIDE + 1), "float32", False),
    ((WIDE + 1, 2 * WIDE), "float32", False),
  ],
)
def test_a_cpu_multiplies_a_transposed_copy(widths, dtype, is_copied):
  inputs = (jnp.ones((64, width), dtype) for width in widths)
  lowered = jax.jit(matmul.sum_of_outer).lower(*inputs)
  assert ("transpose" in lowered.as_text()) == is_copied
  # XLA would multiply x itself, transposed or not, if it undid the copy.
  compiled = lowered.compile().as_text()
  assert ("lhs_contracting_dims={1}" in compiled) == is_copied
