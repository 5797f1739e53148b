"""Tests of rotary positions."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import rotary
from ultramem_jax.settings.rope_scaling import RopeScaling
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


def llama3(rate, width, theta, s):
  """The rate of a pair: short wavelengths stay, long ones are stretched."""
  wavelength = 2 * math.pi / rate
  if wavelength < s.original_length / s.high_rotations:
    return rate
  if wavelength > s.original_length / s.low_rotations:
    return rate / s.factor
  smooth = (s.original_length / wavelength - s.low_rotations) / (
    s.high_rotations - s.low_rotations
  )
  return (1 - smooth) * rate / s.factor + smooth * rate


def yarn(rate, width, theta, s):
  """The rate of a pair, by its number: pairs that turn so often are bounds."""
  bounds = [
    width
    * math.log(s.original_length / (turns * 2 * math.pi))
    / (2 * math.log(theta))
    for turns in (s.high_rotations, s.low_rotations)
  ]
  if s.truncate:
    bounds = [math.floor(bounds[0]), math.ceil(bounds[1])]
  low, high = max(bounds[0], 0), min(bounds[1], width - 1)
  pair = -math.log(rate) / math.log(theta) * width / 2
  ramp = min(max((pair - low) / (high - low), 0), 1)
  return rate / s.factor * ramp + rate * (1 - ramp)


SCALED = {
  "linear": (RopeScaling("linear", 4.0), lambda rate, *_: rate / 4, 1.0),
  # Of Llama 3.1.
  "llama3": (RopeScaling("llama3", 8.0, 8192, 1.0, 4.0), llama3, 1.0),
  # Of Qwen2.5, and with every setting another.
  "yarn": (
    RopeScaling("yarn", 4.0, 32768, 1.0, 32.0),
    yarn,
    0.1 * math.log(4) + 1,
  ),
  "yarn, unrounded": (
    RopeScaling("yarn", 8.0, 100, 2.0, 20.0, False, 1.5),
    yarn,
    1.5,
  ),
}


@pytest.mark.parametrize(
  "scaling, slow, amplitude", SCALED.values(), ids=SCALED
)
def test_scaled_wavelengths_are_the_published_ones(scaling, slow, amplitude):
  width, theta = 64, 500_000.0
  rates = [theta ** (-2 * i / width) for i in range(width // 2)]
  expected_H = np.array([slow(rate, width, theta, scaling) for rate in rates])
  assert (expected_H < np.array(rates)).any()
  frequency_H = rotary.frequencies(width, theta, scaling)
  np.testing.assert_allclose(frequency_H, expected_H, rtol=2e-6)
  position_BT = np.array([[0, 7, 300]])
  pair = rotary.angles(jnp.asarray(position_BT), width, theta, scaling)
  angle_BTH = position_BT[..., None] * expected_H
  assert_close(
    pair,
    (amplitude * np.sin(angle_BTH), amplitude * np.cos(angle_BTH)),
    # 300 radians are rounded to 3e-5.
    tolerance=1e-4,
  )
