"""Scaled rotary positions: what they are multiplied by, what is refused."""

import math

from tests.settings import refusals
from ultramem_jax.settings.rope_scaling import RopeScaling


def test_yarn_has_an_amplitude_of_its_own():
  assert RopeScaling("linear", 4.0).amplitude == 1
  assert RopeScaling("yarn", 4.0).amplitude == 0.1 * math.log(4) + 1
  assert RopeScaling("yarn", 0.5).amplitude == 1
  assert RopeScaling("yarn", 4.0, attention_factor=1.5).amplitude == 1.5


def scaled(**fields):
  return {f"model.rope_scaling.{name}": x for name, x in fields.items()}


@refusals.cases(
  [
    (
      scaled(kind="ntk"),
      "model.rope_scaling.kind",
      "none, linear, llama3, yarn",
    ),
    (scaled(factor=0.0), "model.rope_scaling.factor", "positive"),
    (scaled(factor=4.0), "model.rope_scaling.factor", "1 with kind = 'none'"),
    (
      scaled(original_length=0),
      "model.rope_scaling.original_length",
      "least 1",
    ),
    (
      scaled(attention_factor=-1.0),
      "model.rope_scaling.attention_factor",
      "at least 0",
    ),
    (
      scaled(low_rotations=4.0),
      "model.rope_scaling.high_rotations",
      "above low_rotations = 4.0",
    ),
    (
      {**scaled(kind="yarn"), "model.rope_theta": 1.0},
      "model.rope_theta",
      "above 1",
    ),
  ]
)
def test_bad_values_are_named(changes, field, allowed):
  refusals.assert_refused(changes, field, allowed)
