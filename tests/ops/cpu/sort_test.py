"""Reads in the order of their rows, against numpy's stable sort."""

import numpy as np
import pytest

from ultramem_jax.ops.cpu import sort


@pytest.mark.parametrize("num_rows", [1, 2, 3000, 2**31 - 1])
def test_reads_are_sorted_and_stay_in_order_within_a_row(num_rows):
  rng = np.random.default_rng(0)
  row_TY = rng.integers(0, num_rows, (70, 11), np.int32)
  row_TY[:5] = row_TY[5:10]
  expected_Z = np.argsort(row_TY.ravel(), kind="stable")
  for found in (
    sort.sort_by_row(row_TY, num_rows),
    sort._pair_sort(row_TY.ravel()),
  ):
    np.testing.assert_array_equal(found[0], row_TY.ravel()[expected_Z])
    np.testing.assert_array_equal(found[1], expected_Z)
