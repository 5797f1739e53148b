"""Random numbers in programs that compile fast and hold nothing but them.

JAX's hash is a loop over whole arrays on a CPU: it holds three more arrays of
the result's size, and is slow to compile for arrays of more than two axes.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import random as extend

# Threefry-2x32 (Salmon et al., Parallel random numbers: as easy as 1, 2, 3,
# 2011): 20 rounds with these rotations, a key injected after every fourth.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = np.uint32(0x1BD11BDA)


def counters(
  row: jax.Array, column: jax.Array, width: int
) -> tuple[jax.Array, jax.Array]:
  """Returns words (high, low) of row * width + column, which may exceed 2^32.

  Args:
    row, column: uint32 arrays of equal shape.
    width: at most 2^16.
  """
  low = (row & 0xFFFF) * jnp.uint32(width)
  middle = (row >> 16) * jnp.uint32(width)
  high = middle >> 16
  for term in (middle << 16, column):
    low += term
    high += (low < term).astype(jnp.uint32)  # the sum wrapped around
  return high, low


def _places(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
  """Returns words (high, low) of the place of each number in an array."""
  axes = [
    jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    for axis in range(len(shape))
  ]
  if math.prod(shape) <= 2**32:
    return jnp.zeros(shape, jnp.uint32), _join(axes, shape)
  return counters(_join(axes[:-1], shape), axes[-1], shape[-1])


def _join(axes: list[jax.Array], shape: tuple[int, ...]) -> jax.Array:
  """Returns the place that indices along the first axes give."""
  place = jnp.zeros(shape, jnp.uint32)
  for index, size in zip(axes, shape, strict=False):
    place = place * jnp.uint32(size) + index
  return place


def _threefry(key_2, high, low):
  """Returns the two words that Threefry makes of (high, low)."""
  keys = (key_2[0], key_2[1], key_2[0] ^ key_2[1] ^ _PARITY)
  high, low = high + keys[0], low + keys[1]
  for group in range(5):
    for rotation in _ROTATIONS[group % 2]:
      high += low
      low = (low << rotation) | (low >> (32 - rotation))
      low ^= high
    high += keys[(group + 1) % 3]
    low += keys[(group + 2) % 3] + jnp.uint32(group + 1)
  return high, low


def _random_bits(key_2, bit_width: int, shape: tuple[int, ...]) -> jax.Array:
  """Returns words of at most 32 bits."""
  high, low = _threefry(key_2, *_places(shape))
  return (high ^ low).astype(f"uint{bit_width}")


def _split(key_2, shape: tuple[int, ...]) -> jax.Array:
  return jnp.stack(_threefry(key_2, *_places(shape)), -1)


def _fold_in(key_2, data) -> jax.Array:
  # By JAX's loop: without it, the hash would be fused into all that uses the
  # key.
  return jax.random.key_data(
    jax.random.fold_in(
      jax.random.wrap_key_data(key_2, impl="threefry2x32"), data
    )
  )


def _seed(seed) -> jax.Array:
  return jax.random.key_data(jax.random.key(seed, impl="threefry2x32"))


_UNROLLED = extend.define_prng_impl(
  key_shape=(2,),
  seed=_seed,
  split=_split,
  random_bits=_random_bits,
  fold_in=_fold_in,
  name="threefry2x32_unrolled",
  tag="fryu",
)


def unrolled(key: jax.Array) -> jax.Array:
  """Returns a PRNG key that gives the same numbers by other programs.

  Every number depends on key and place only, so that one fused loop computes
  an array of them, and each device computes its own part.

  Args:
    key: a threefry PRNG key, from which words of up to 32 bits are drawn; any
      other key is returned as it is. An array of more than 2^32 numbers has a
      last axis of at most 2^16.
  """
  if str(jax.random.key_impl(key)) != "threefry2x32":
    return key
  return jax.random.wrap_key_data(jax.random.key_data(key), impl=_UNROLLED)


def normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Computes jax.random.normal(key, shape), bit for bit, without temporaries.

  Args:
    key: a PRNG key; for one that is not of threefry there are temporaries.
    shape: of the result.
  Returns:
    float32.
  """
  return jax.random.normal(unrolled(key), shape, jnp.float32)
