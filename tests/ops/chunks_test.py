"""Chunks of positions against all positions at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import chunks


def test_a_chunk_holds_what_its_budget_allows():
  # 2 sequences of 10 bytes a position: 20 bytes each.
  assert chunks.chunk_length(100, 2, 7, 10) == 5
  assert chunks.chunk_length(10**6, 2, 7, 10) == 7
  assert chunks.chunk_length(0, 2, 7, 10) == 1


@pytest.mark.parametrize("most", [1, 2, 3, 7, 100])
def test_scanned_chunks_are_the_whole(most):
  """Sums and squares of seven positions, the last chunk padded."""
  x_BTD = np.arange(2 * 7 * 3, dtype=np.float32).reshape(2, 7, 3)
  lengths = []

  def function(total_BD, x_BTD):
    lengths.append(x_BTD.shape[1])
    return total_BD + x_BTD.sum(1), jnp.square(x_BTD)

  total_BD, square_BTD = jax.jit(
    lambda x_BTD: chunks.scan_chunks(function, jnp.zeros((2, 3)), x_BTD, most)
  )(x_BTD)
  assert max(lengths) <= most
  np.testing.assert_array_equal(total_BD, x_BTD.sum(1))
  np.testing.assert_array_equal(square_BTD, x_BTD**2)
