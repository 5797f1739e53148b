"""Rotary positions (Su et al., arXiv 2104.09864), in the half-rotation form."""

import math

import jax
import jax.numpy as jnp

from ultramem_jax.ops import chunks

# Chunks in which sines are computed: any number but one makes a loop.
CHUNKS = 4


def angles(
  position_BT: jax.Array, width: int, theta: float
) -> tuple[jax.Array, jax.Array]:
  """Returns sine and cosine of each position's angles.

  They are computed in a loop, because XLA's CPU compiler would fuse them into
  all that reads them, and compute them again for every head of every layer.

  Args:
    position_BT: [B, T] int32.
    width: of a head, even.
    theta: base of the wavelengths, 2 pi theta^(2 i / width).
  Returns:
    (sin_BTH, cos_BTH): [B, T, width / 2] float32.
  """
  half = width // 2
  frequency_H = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)

  def compute(_, position_BT):
    angle_BTH = jnp.multiply.outer(position_BT, frequency_H)
    return None, (jnp.sin(angle_BTH), jnp.cos(angle_BTH))

  positions = math.ceil(position_BT.shape[1] / CHUNKS)
  return chunks.scan_chunks(compute, None, position_BT, positions)[1]


def rotate(
  x_BTQH: jax.Array, sin_BTH: jax.Array, cos_BTH: jax.Array
) -> jax.Array:
  """Rotates queries or keys by the angles of their positions, in float32.

  Args:
    x_BTQH: [B, T, Q, H] float.
    sin_BTH, cos_BTH: of `angles`, half as wide.
  Returns:
    [B, T, Q, H] in x's dtype.
  """
  sin_BT1H, cos_BT1H = sin_BTH[:, :, None], cos_BTH[:, :, None]
  first, second = jnp.split(x_BTQH.astype(jnp.float32), 2, axis=-1)
  rotated = [
    first * cos_BT1H - second * sin_BT1H,
    second * cos_BT1H + first * sin_BT1H,
  ]
  return jnp.concatenate(rotated, axis=-1).astype(x_BTQH.dtype)
