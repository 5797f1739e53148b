"""Low-precision storage: bfloat16 as its bits, rounded at random; and int8.

Tables and moments in bfloat16 are stored as uint16, because XLA's CPU compiler
converts a whole bfloat16 array to float32 before a loop that gathers from it or
writes to it. Rounding to nearest would lose an update far smaller than a
number's last bit; rounding up or down at random keeps it on average.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ultramem_jax.ops.shuffle import mix

# For matmuls that need all bits of float32: by default a TPU rounds the factors
# to bfloat16, and a GPU to 10 bits of mantissa.
EXACT = jax.lax.Precision.HIGHEST


def exact(*factors: jax.Array) -> jax.lax.Precision | None:
  """Returns `EXACT` for factors of float32; others lose no bits anyway."""
  return EXACT if all(x.dtype == jnp.float32 for x in factors) else None


# How settings name what is stored. An int8 row has a scale: `quantize_rows`.
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.uint16, "int8": jnp.int8}


def decode(x: jax.Array) -> jax.Array:
  """Returns stored numbers as float32; uint16 are the bits of bfloat16."""
  if x.dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(x.astype(jnp.uint32) << 16, jnp.float32)
  return x.astype(jnp.float32)


def encode(x: jax.Array, dtype: Any) -> jax.Array:
  """Returns float32 x as it is stored in dtype, rounded to nearest."""
  if dtype == jnp.uint16:
    return jax.lax.bitcast_convert_type(x.astype(jnp.bfloat16), jnp.uint16)
  return x.astype(dtype)


def quantize_rows(x_IW: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Quantizes each row to int8 with a scale: x is about scale * number.

  The largest magnitude of a row becomes 127, others are rounded to nearest;
  the error of a number is at most half the scale. Rows of zeros have scale 1.

  Args:
    x_IW: [I, W] float.
  Returns:
    (numbers, scales): [I, W] int8 and [I] float32.
  """
  largest_I = abs(x_IW).max(-1)
  scale_I = jnp.where(largest_I > 0, largest_I / 127, 1).astype(jnp.float32)
  return jnp.round(x_IW / scale_I[:, None]).astype(jnp.int8), scale_I


def encode_at_random(x: jax.Array, dtype: Any, noise: jax.Array) -> jax.Array:
  """Returns x as it is stored in dtype, rounded up or down at random.

  The mean of the two, by their chances, is x. A number that dtype can hold
  stays what it is.

  Args:
    x: float32.
    dtype: uint16, or float32, in which x is stored unchanged.
    noise: uint32 of x's shape, uniform in [0, 2^16).
  """
  if dtype == jnp.float32:
    return x
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
  return (bits >> 16).astype(jnp.uint16)


def noise(key: jax.Array, row_z: jax.Array, width: int) -> jax.Array:
  """Returns uniform uint32 [z, W] that depend on key, row and column only.

  A hash for rounding, a tenth of the work of a generator of random numbers.

  Args:
    key: uint32 scalar.
    row_z: [z] int32.
    width: W.
  """
  hash_z = mix(row_z.astype(jnp.uint32) ^ key)
  column_W = jnp.arange(width, dtype=jnp.uint32) * jnp.uint32(0x9E3779B9)
  return mix(hash_z[:, None] + column_W[None])
