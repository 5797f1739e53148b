"""Low-precision storage: bfloat16 as its bits, rounded at random.

Tables and moments are stored as uint16, because XLA's CPU compiler converts a
bfloat16 array to float32 as a whole before a loop that gathers from it or
writes to it. An update far smaller than a number's last bit would be lost by
rounding to nearest; rounded up or down with the right chances it is kept on
average.
"""

import jax
import jax.numpy as jnp

# Of products of float32 numbers that have to stay such: by default a TPU rounds
# them to bfloat16 first, and a GPU to 10 bits.
EXACT = jax.lax.Precision.HIGHEST

# int8 numbers are of a row whose scale is kept apart: see `quantize_rows`.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.uint16, "int8": jnp.int8}


def decode(x):
  """float32 of stored numbers; other dtypes than uint16 are converted."""
  if x.dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
  return x.astype(jnp.float32)


def encode(x, dtype):
  """Stored numbers of float32 x, rounded to nearest."""
  if dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
  return x.astype(dtype)


def quantize_rows(x_IW):
  """Rows as int8 and a scale each: x is about scale * number.

  The largest magnitude of a row becomes 127, others are rounded to nearest;
  the error of a number is at most half the scale. Rows of zeros have scale 1.

  Returns:
    ([I, W] int8, [I] float32).
  """
  largest_I = abs(x_IW).max(-1)
  scale_I = jnp.where(largest_I > 0, largest_I / 127, 1).astype(jnp.float32)
  return jnp.round(x_IW / scale_I[:, None]).astype(jnp.int8), scale_I


def encode_at_random(x, dtype, noise):
  """Stored numbers of float32 x, rounded up or down at random.

  The chance of each is such that the mean is x; what can be stored stays as
  it is.

  Args:
    x: float32.
    dtype: float32 (stored as it is) or uint16.
    noise: uint32, uniform in [0, 2^16).
  """
  if dtype == jnp.float32:
    return x
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
  return (bits >> 16).astype(jnp.uint16)


def noise(key, row_P, width: int):
  """Uniform uint32 [P, W], a function of key, row and column alone.

  A hash for rounding, a tenth of the work of a generator of random numbers.

  Args:
    key: uint32 scalar.
    row_P: int32.
    width: W.
  """
  row_P = _mix(row_P.astype(jnp.uint32) ^ key)
  column_W = jnp.arange(width, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
  return _mix(row_P[:, None] + column_W[None])


def _mix(x):
  """A bijection of uint32 that scatters its bits (multiply and xor-shift)."""
  x ^= x >> 16
  x *= jnp.uint32(0x7FEB352D)
  x ^= x >> 15
  x *= jnp.uint32(0x846CA68B)
  return x ^ (x >> 16)
