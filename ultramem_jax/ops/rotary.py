"""Rotary positions (Su et al., arXiv 2104.09864), in the half-rotation form.

A pair of features i turns by f_i = theta^(-2 i / H) from one position to the
next. A model that was trained on L positions reads longer texts if the slow
pairs turn more slowly, by a factor s:

  f_i (k_i + (1 - k_i) / s)

  linear: k = 0 (Chen et al., arXiv 2306.15595).
  llama3: k grows from 0 to 1 with the rotations L f_i / (2 pi), linearly from
    `low_rotations` to `high_rotations` (Llama 3.1, arXiv 2407.21783).
  yarn: k falls from 1 to 0 with i, linearly between the pairs that make
    `high_rotations` and `low_rotations`; sines and cosines are multiplied by
    0.1 ln(s) + 1 (Peng et al., arXiv 2309.00071).
"""

import math

import jax
import jax.numpy as jnp

from ultramem_jax.ops import chunks
from ultramem_jax.settings.rope_scaling import RopeScaling

# Chunks in which sines are computed: any number but one makes a loop.
CHUNKS = 4

NO_SCALING = RopeScaling()


def frequencies(width: int, theta: float, scaling: RopeScaling) -> jax.Array:
  """Returns the radians by which each pair turns per position.

  Args:
    width: of a head, even.
    theta: base of the wavelengths, 2 pi theta^(2 i / width).
    scaling: how they are stretched.
  Returns:
    [h] float32, half as many as the width of a head.
  """
  half = width // 2
  index_h = jnp.arange(half, dtype=jnp.float32)
  frequency_h = theta ** (-index_h / half)
  if scaling.kind == "none":
    return frequency_h
  kept_h = 0.0
  low, high = scaling.low_rotations, scaling.high_rotations
  if scaling.kind == "llama3":
    rotations_h = scaling.original_length / (2 * math.pi) * frequency_h
    kept_h = jnp.clip((rotations_h - low) / (high - low), 0, 1)
  elif scaling.kind == "yarn":
    first, last = (
      half
      * math.log(scaling.original_length / (2 * math.pi * rotations))
      / math.log(theta)
      for rotations in (high, low)
    )
    if scaling.truncate:
      first, last = math.floor(first), math.ceil(last)
    # The published code counts to the width here, not to half of it.
    first, last = max(first, 0), min(last, width - 1)
    # If both bounds are equal, the ramp is a step.
    steps = last - first or 1e-3
    kept_h = 1 - jnp.clip((index_h - first) / steps, 0, 1)
  return frequency_h * (kept_h + (1 - kept_h) / scaling.factor)


def angles(
  position_BT: jax.Array,
  width: int,
  theta: float,
  scaling: RopeScaling = NO_SCALING,
) -> tuple[jax.Array, jax.Array]:
  """Returns sine and cosine of each position's angles.

  They are computed in a loop, because XLA's CPU compiler would fuse them into
  all that reads them, and compute them again for every head of every layer.

  Args:
    position_BT: [B, T] int32.
    width, theta, scaling: as for `frequencies`.
  Returns:
    (sin_BTh, cos_BTh): [B, T, width / 2] float32, times the amplitude of the
    scaling.
  """
  frequency_h = frequencies(width, theta, scaling)
  amplitude = scaling.amplitude

  def compute(_, position_BT):
    angle_BTh = jnp.multiply.outer(jnp.float32(position_BT), frequency_h)
    pair = jnp.sin(angle_BTh), jnp.cos(angle_BTh)
    return None, tuple(amplitude * x for x in pair)

  positions = math.ceil(position_BT.shape[1] / CHUNKS)
  return chunks.scan_chunks(compute, None, position_BT, positions)[1]


def rotate(
  x_BTQH: jax.Array, sin_BTh: jax.Array, cos_BTh: jax.Array
) -> jax.Array:
  """Rotates queries or keys by the angles of their positions, in float32.

  Args:
    x_BTQH: [B, T, Q, H] float.
    sin_BTh, cos_BTh: of `angles`, half as wide.
  Returns:
    [B, T, Q, H] in x's dtype.
  """
  sin_BT1h, cos_BT1h = sin_BTh[:, :, None], cos_BTh[:, :, None]
  first, second = jnp.split(x_BTQH.astype(jnp.float32), 2, axis=-1)
  rotated = [
    first * cos_BT1h - second * sin_BT1h,
    second * cos_BT1h + first * sin_BT1h,
  ]
  return jnp.concatenate(rotated, axis=-1).astype(x_BTQH.dtype)
