"""Tests of rotary positions."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import rotary
from ultramem_jax.testing import assert_close

THETA = 100.0


def rotated(x_BTQH, position_BT):
  sin_BTH, cos_BTH = rotary.angles(position_BT, x_BTQH.shape[-1], THETA)
  return rotary.rotate(x_BTQH, sin_BTH, cos_BTH)


# Fewer positions than chunks, whole chunks, and a chunk that is filled up.
@pytest.mark.parametrize("length", [1, 8, 9])
def test_rotates_pairs_by_position_times_frequency(length):
  rng = np.random.default_rng(0)
  x_BTQH = rng.normal(size=(2, length, 3, 6)).astype(np.float32)
  position_BT = rng.integers(0, 50, (2, length))
  pairs_BTQH = x_BTQH[..., :3] + 1j * x_BTQH[..., 3:]
  angle_BTH = position_BT[..., None] / THETA ** (np.arange(3) / 3)
  pairs_BTQH = pairs_BTQH * np.exp(1j * angle_BTH)[:, :, None]
  expected = np.concatenate([pairs_BTQH.real, pairs_BTQH.imag], -1)
  assert_close(rotated(x_BTQH, jnp.asarray(position_BT)), expected)


def test_sines_are_computed_once_for_all_that_read_them():
  x_BTQH, position_BT = jnp.ones((2, 16, 2, 8)), jnp.ones((2, 16), jnp.int32)
  compiled = jax.jit(lambda x, p: rotated(rotated(x, p), p)).lower(
    x_BTQH, position_BT
  )
  shapes = re.findall(
    r"f32\[([\d,]+)\]\S* sine\(", compiled.compile().as_text()
  )
  # B, the positions of a chunk, H: not once for every head.
  sizes = [math.prod(map(int, shape.split(","))) for shape in shapes]
  assert sizes == [2 * 4 * 4]
