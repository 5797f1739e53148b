"""Tests of random numbers without temporaries."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import random


@pytest.mark.parametrize("shape", [(), (9,), (300, 65), (3, 2, 1, 5)])
def test_normal_equals_jax_random_to_the_last_bit(shape):
  key = jax.random.key(5)
  np.testing.assert_array_equal(
    jax.jit(random.normal, static_argnums=1)(key, shape),
    jax.random.normal(key, shape),
  )


@pytest.mark.parametrize(
  "draw",
  [
    lambda key: jax.random.uniform(key, (3, 7)),
    lambda key: jax.random.permutation(key, 50),
    lambda key: jax.random.bits(key, (5,), "uint8"),
    lambda key: jax.random.normal(jax.random.fold_in(key, 2**32 - 1), (4,)),
    lambda key: jax.random.key_data(jax.random.split(key, (2, 3))),
  ],
)
def test_an_unrolled_key_gives_the_same_numbers(draw):
  key = jax.random.key(5)
  np.testing.assert_array_equal(
    jax.jit(draw)(random.unrolled(key)), jax.jit(draw)(key)
  )


def test_keys_of_other_kinds_are_taken_too():
  for key in (jax.random.PRNGKey(5), jax.random.key(5, impl="rbg")):
    np.testing.assert_array_equal(
      random.normal(key, (4, 3)), jax.random.normal(key, (4, 3))
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
