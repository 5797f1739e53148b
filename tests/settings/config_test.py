"""A run's configuration: what is refused, and that it is kept as it is."""

import dataclasses
import json

import pytest

from configs import tiny
from tests.settings import refusals
from ultramem_jax.settings import config, kinds
from ultramem_jax.settings.errors import ConfigError

NAN, INF = float("nan"), float("inf")


@refusals.cases(
  [
    ({"seed": -1}, "seed", "at least 0"),
    ({"seed": 2**32}, "seed", "less than 2^32"),
    *(
      ({name: 0}, name, "at least 1")
      for name in (
        "steps",
        "batch_size",
        "accumulation_steps",
        "log_every",
        "eval_every",
      )
    ),
    ({"eval_batches": -1}, "eval_batches", "at least 0"),
    (
      {"batch_size": 6, "accumulation_steps": 4},
      "batch_size",
      "divisible by accumulation_steps = 4",
    ),
    ({"init_skip": "head"}, "init_skip", "is only for a run with init_from"),
    (
      {
        "model.attention": "cudnn",
        "model.dtype": "bfloat16",
        "data.seq_len": 33,
      },
      "data.seq_len",
      "must be even",
    ),
    ({"steps": "10"}, "steps", "of type int"),
    ({"steps": 10.0}, "steps", "of type int"),
    ({"steps": True}, "steps", "of type int"),
    ({"typo": 3}, "typo", "no such field; known: seed, "),
  ]
)
def test_bad_values_of_a_run_are_named(changes, field, allowed):
  refusals.assert_refused(changes, field, allowed)


@refusals.cases(
  [
    ({"data.source": "x"}, "data.source", "one of"),
    ({"data.packing": "x"}, "data.packing", "one of"),
    ({"data.seq_len": 0}, "data.seq_len", "at least 1"),
    ({"data.shuffle_window": 0}, "data.shuffle_window", "at least 1"),
    ({"data.prefetch": -1}, "data.prefetch", "at least 0"),
    *(
      (
        {"data.valid_fraction": value},
        "data.valid_fraction",
        "strictly between 0 and 1",
      )
      for value in (0.0, 1.0)
    ),
    ({"data.path": 3}, "data.path", "of type str"),
    ({"data.path": "a.txt"}, "data.path", "source = 'text'"),
    ({"data.valid_path": "a.txt"}, "data.valid_path", "source = 'text'"),
    ({"data.source": "text"}, "data.path", "glob"),
    ({"data.source": "tfds"}, "data.tfds_name", "c4/en"),
  ]
)
def test_bad_values_of_data_are_named(changes, field, allowed):
  refusals.assert_refused(changes, field, allowed)


@refusals.cases(
  [
    *(
      ({f"optim.{name}": -1.0}, f"optim.{name}", "at least 0")
      for name in ("weight_decay", "clip_norm", "value_lr_multiplier", "z_loss")
    ),
    *(
      ({f"optim.{name}": value}, f"optim.{name}", "in [0, 1]")
      for value in (-0.1, 1.1)
      for name in ("warmup_fraction", "init_fraction", "final_fraction")
    ),
    *(
      ({f"optim.{name}": value}, f"optim.{name}", "in [0, 0.999999]")
      for value in (-0.1, 1.0, 0.99999999999)
      for name in ("beta1", "beta2")
    ),
    *(
      (
        {"optim.warmup_fraction": value},
        "optim.warmup_fraction",
        "one of 300 steps for the cosine",
      )
      for value in (0.9999, 1.0)
    ),
    (
      {"optim.value_lr_horizon": 1e-3},
      "optim.value_lr_horizon",
      "one of 300 steps",
    ),
    *(
      ({"optim.value_lr_horizon": value}, "optim.value_lr_horizon", "in (0, 1]")
      for value in (0.0, 1.5)
    ),
    *(
      ({"optim.learning_rate": value}, "optim.learning_rate", "finite")
      for value in (NAN, INF)
    ),
    ({"optim.learning_rate": 0.0}, "optim.learning_rate", "positive"),
    *(
      ({"optim.eps": value}, "optim.eps", "in [1e-16, 1]")
      for value in (0.0, 1e-17)
    ),
    ({"optim.eps": "1e-8"}, "optim.eps", "of type float"),
    ({"optim.eps": None}, "optim.eps", "of type float"),
  ]
)
def test_bad_values_of_the_optimizer_are_named(changes, field, allowed):
  refusals.assert_refused(changes, field, allowed)


@refusals.cases(
  [
    ({"checkpoint.every": 0}, "checkpoint.every", "at least 1"),
    ({"checkpoint.keep": 0}, "checkpoint.keep", "at least 1"),
    *(
      (
        {"mesh.data": value},
        "mesh.data",
        "-1 (all devices that remain) or at least 1",
      )
      for value in (0, -2)
    ),
  ]
)
def test_bad_values_of_checkpoints_and_meshes_are_named(
  changes, field, allowed
):
  refusals.assert_refused(changes, field, allowed)


@pytest.mark.parametrize("name", ["steps", "model", "data.seq_len"])
def test_missing_fields(name):
  c = tiny.get_config().to_dict()
  group, field = refusals.section(c, name)
  del group[field]
  with pytest.raises(ConfigError, match=rf"^{name} = None: is missing$"):
    config.parse(c)


def test_round_trip():
  """ConfigDict -> Config -> dict -> JSON -> dict -> Config."""
  c = config.parse(tiny.get_config())
  as_dict = config.to_dict(c)
  given = tiny.get_config().to_dict()
  own = kinds.DEFAULTS["ultramem"]
  given["model"]["memory"].update(own)
  given["model"].update(num_kv_heads=4, head_dim=32)
  assert as_dict == given
  again = config.parse(json.loads(json.dumps(as_dict)))
  assert again == c
  assert hash(again) == hash(c)
  other = dataclasses.replace(c, seed=1)
  assert config.parse(config.to_dict(other)) == other != c
  with pytest.raises(dataclasses.FrozenInstanceError):
    c.seed = 2


def test_an_integer_is_a_float():
  c = tiny.get_config().to_dict()
  c["optim"]["clip_norm"] = 2
  clip_norm = config.parse(c).optim.clip_norm
  assert clip_norm == 2.0
  assert type(clip_norm) is float
