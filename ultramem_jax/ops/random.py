"""Random numbers for arrays that fill the memory of all devices.

`jax.random.normal` on a CPU holds three more arrays of the result's size,
because its hash runs as a loop over whole arrays.
"""

import jax
import jax.numpy as jnp
import numpy as np

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


def _threefry(key_2, high, low):
  """Returns the xor of the two words that Threefry makes of (high, low)."""
  keys = (key_2[0], key_2[1], key_2[0] ^ key_2[1] ^ _PARITY)
  high, low = high + keys[0], low + keys[1]
  for group in range(5):
    for rotation in _ROTATIONS[group % 2]:
      high += low
      low = (low << rotation) | (low >> (32 - rotation))
      low ^= high
    high += keys[(group + 1) % 3]
    low += keys[(group + 2) % 3] + jnp.uint32(group + 1)
  return high ^ low


def normal(key: jax.Array, shape: tuple[int, int]) -> jax.Array:
  """Computes jax.random.normal(key, shape), bit for bit, without temporaries.

  Every number depends on key and place only, so that one fused loop computes
  them, and each device computes its own.

  Args:
    key: a threefry PRNG key.
    shape: [I, W]; W at most 2^16.
  Returns:
    [I, W] float32.
  """
  row_IW, column_IW = (
    jax.lax.broadcasted_iota(jnp.uint32, shape, axis) for axis in (0, 1)
  )
  bits_IW = _threefry(
    jax.random.key_data(key), *counters(row_IW, column_IW, shape[1])
  )
  # The highest 23 bits as the fraction of a float in [1, 2); then to (-1, 1).
  float_IW = jax.lax.bitcast_convert_type(
    (bits_IW >> 9) | jnp.uint32(0x3F800000), jnp.float32
  )
  least = np.nextafter(np.float32(-1), np.float32(0))
  uniform_IW = jnp.maximum(least, (float_IW - 1) * (1 - least) + least)
  return np.float32(np.sqrt(2)) * jax.lax.erf_inv(uniform_IW)
