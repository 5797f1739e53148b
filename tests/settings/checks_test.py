"""Numbers at the edges of what programs compute with."""

import dataclasses

import pytest

from configs import tiny
from ultramem_jax.settings import checks, config
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.sampling import Sampling


def parse_with(name, value):
  values = tiny.get_config().to_dict()
  section, _, field = name.rpartition(".")
  (values[section] if section else values)[field] = value
  return config.parse(values)


@pytest.mark.parametrize(
  ("name", "value", "allowed"),
  [
    ("optim.learning_rate", 1e39, "must be 0, or from 1.2e-38 to 3.4e+38"),
    ("optim.learning_rate", 1e30, "must be at most 1000"),
    ("optim.weight_decay", 1e4, "must be at most 1000"),
    ("optim.weight_decay", 1e-39, "must be 0, or from 1.2e-38"),
    ("optim.clip_norm", 1e-40, "must be 0, or from 1.2e-38"),
    ("optim.eps", 1e-320, "must be 0, or from 1.2e-38"),
    ("optim.z_loss", 10**400, "must be 0, or from 1.2e-38"),
    ("model.rope_theta", 1e-300, "must be 0, or from 1.2e-38"),
    ("model.rope_theta", 0.5, "must be at least 1"),
    ("sample.temperature", 1e-40, "must be 0, or from 1.2e-38"),
    ("steps", 2**31, "must be less than 2^31 in size"),
    ("log_every", 10**30, "must be less than 2^31 in size"),
    ("mesh.data", -(2**40), "must be less than 2^31 in size"),
    ("seed", 2**70, "must be at least 0 and less than 2^32"),
  ],
)
def test_what_float32_or_int32_would_change_is_refused(name, value, allowed):
  with pytest.raises(ConfigError) as error:
    parse_with(name, value)
  message = str(error.value)
  assert message.startswith(f"{name} = {value!r}: ")
  assert allowed in message


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("optim.beta2", 0.999999),
    ("optim.eps", 1e-16),
    ("optim.clip_norm", 2e-38),
    ("model.norm_eps", 1e-12),
    ("steps", 2**31 - 1),
    ("seed", 2**32 - 1),
  ],
)
def test_the_edges_are_allowed(name, value):
  parsed = parse_with(name, value)
  for part in name.split("."):
    parsed = getattr(parsed, part)
  assert parsed == value


@pytest.mark.parametrize(
  "values", [{"x" * 5000: 1}, {"steps": "x" * 5000}, {"y": ["x" * 5000]}]
)
def test_an_error_quotes_the_beginning_of_what_is_long(values):
  """A damaged file may hold names and values of any length."""
  with pytest.raises(ConfigError) as error:
    config.parse({**tiny.get_config().to_dict(), **values})
  assert "xxx..." in str(error.value)
  assert len(str(error.value)) < 1500


def test_layernorm_of_one_number_is_refused():
  memory = config.parse(tiny.get_config()).model.memory
  with pytest.raises(ConfigError, match="key_dim = 1: must be at least 2"):
    dataclasses.replace(memory, key_dim=1, query_key_norm="layernorm")
  dataclasses.replace(memory, key_dim=1, query_key_norm="rms")


def test_sampling_has_the_same_ranges():
  with pytest.raises(ConfigError, match="top_k = 4294967296: must be less"):
    Sampling(1, top_k=2**32)


def test_a_seed_is_taken_whole_or_refused():
  checks.require_seed("--seed", 2**32 - 1)
  for seed in (-1, 2**32, 2**64):
    with pytest.raises(ConfigError, match=f"--seed = {seed}: "):
      checks.require_seed("--seed", seed)
