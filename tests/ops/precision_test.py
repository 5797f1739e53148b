"""Numbers as tables store them: bfloat16 in bits, int8 with scales."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import precision


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.5, 1e-38, np.inf])
def test_what_can_be_stored_stays(value):
  x = jnp.full(5, value, jnp.float32).astype(jnp.bfloat16).astype(jnp.float32)
  noise = jnp.asarray([0, 1, 1000, 2**15, 2**16 - 1], jnp.uint32)
  stored = precision.encode_at_random(x, jnp.uint16, noise)
  np.testing.assert_array_equal(precision.decode(stored), x)


def test_int8_rows_are_off_by_half_a_step_at_most():
  x_IW = jax.random.normal(jax.random.key(0), (50, 16))
  x_IW *= jnp.exp(4 * jax.random.normal(jax.random.key(1), (50, 1)))
  x_IW = x_IW.at[3].set(0)
  number_IW, scale_I = precision.quantize_rows(x_IW)
  assert number_IW.dtype == jnp.int8
  assert abs(number_IW).max(-1).tolist() == [
    0 if row == 3 else 127 for row in range(50)
  ]
  error_IW = abs(number_IW * scale_I[:, None] - x_IW) / scale_I[:, None]
  assert error_IW.max() <= 0.5 + 1e-4
  np.testing.assert_array_equal(number_IW[3], 0)
