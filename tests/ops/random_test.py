"""Tests of random numbers without temporaries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import random


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (300, 65)])
def test_equals_jax_random_to_the_last_bit(shape):
  key = jax.random.key(5)
  np.testing.assert_array_equal(
    jax.jit(random.normal, static_argnums=1)(key, shape),
    jax.random.normal(key, shape),
  )


def test_counters_beyond_32_bits():
  width = 1000
  places = [
    0,
    2**32 - 1,
    2**32,
    2**32 + 999,
    123_456_789_012,
    (2**32 - 1) * width + 999,
  ]
  row, column = (
    jnp.array([f(place, width) for place in places], jnp.uint32)
    for f in (lambda a, b: a // b, lambda a, b: a % b)
  )
  high, low = random.counters(row, column, width)
  assert [
    int(a) << 32 | int(b) for a, b in zip(high, low, strict=True)
  ] == places


def test_needs_no_memory_besides_the_result():
  shape = (4096, 256)
  memory = (
    jax.jit(random.normal, static_argnums=1)
    .lower(jax.random.key(0), shape)
    .compile()
    .memory_analysis()
  )
  assert memory.output_size_in_bytes == 4 * 4096 * 256
  assert memory.temp_size_in_bytes < 1024
