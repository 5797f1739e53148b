"""Runs that go on with other settings, where that is asked for."""

import json

import pytest

from configs import of_workdir, tiny
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import ConfigError

CORPUS = "standard library of Python 3.11.7"


def make_config(**overrides):
  config = tiny.get_config()
  config.update_from_flattened_dict(
    {name.replace("__", "."): value for name, value in overrides.items()}
  )
  return config_lib.parse(config)


@pytest.fixture
def workdir(tmp_path):
  """Of a run at step 30 of 300."""
  workdir_lib.claim(tmp_path, make_config(), CORPUS)
  for step in (20, 30):
    (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
  (tmp_path / "checkpoints" / "corrupt-40").mkdir()
  return tmp_path


def test_settings_are_changed_and_remembered(workdir):
  assert workdir_lib.overridden_at(workdir) == 0
  longer = make_config(steps=500, optim__learning_rate=1e-4)
  workdir_lib.claim(workdir, longer, CORPUS, override=True)
  assert workdir_lib.load_config(workdir) == longer
  assert workdir_lib.overridden_at(workdir) == 30
  # From now on the run is bound to them.
  workdir_lib.claim(workdir, longer, CORPUS)
  with pytest.raises(ConfigError, match="steps = 300, held: 500"):
    workdir_lib.claim(workdir, make_config(), CORPUS)
  (workdir / "checkpoints" / "400").mkdir()
  again = make_config(steps=500, optim__learning_rate=1e-5)
  workdir_lib.claim(workdir, again, CORPUS, override=True)
  record = json.loads((workdir / "config.json").read_text())
  first = make_config().optim.learning_rate
  assert record["overrides"] == [
    {
      "step": 30,
      "steps": {"from": 300, "to": 500},
      "optim.learning_rate": {"from": first, "to": 1e-4},
    },
    {"step": 400, "optim.learning_rate": {"from": 1e-4, "to": 1e-5}},
  ]


def test_a_command_may_name_a_run_in_place_of_its_config(workdir):
  """`train.py --workdir=DIR --config.steps=500 --override`."""
  longer = make_config(steps=500, optim__learning_rate=1e-4)
  workdir_lib.claim(workdir, longer, CORPUS, override=True)
  held = of_workdir.get_config(str(workdir))
  assert config_lib.parse(held) == longer
  held.steps = 600
  workdir_lib.claim(workdir, config_lib.parse(held), CORPUS, override=True)


def test_what_only_needs_to_be_asked_for_says_so(workdir):
  with pytest.raises(ConfigError, match=r"steps = 301.*, or --override to go"):
    workdir_lib.claim(workdir, make_config(steps=301), CORPUS)


def test_settings_that_may_differ_are_not_changed(workdir):
  given = make_config(steps=500, mesh__data=4, checkpoint__keep=9)
  workdir_lib.claim(workdir, given, CORPUS, override=True)
  assert workdir_lib.load_config(workdir) == make_config(steps=500)


@pytest.mark.parametrize(
  ("name", "value"),
  [
    ("seed", 5),
    ("batch_size", 4),
    ("model__mlp_dim", 64),
    ("optim__frozen_dtype", "bfloat16"),
    ("data__seq_len", 16),
  ],
)
def test_what_makes_another_run_is_refused_all_the_same(workdir, name, value):
  before = (workdir / "config.json").read_bytes()
  other = make_config(**{name: value, "steps": 400})
  with pytest.raises(ConfigError) as error:
    workdir_lib.claim(workdir, other, CORPUS, override=True)
  message = str(error.value)
  assert f"{name.replace('__', '.')} = {value!r}, held: " in message
  assert "steps" not in message and "--override" not in message
  assert (workdir / "config.json").read_bytes() == before


def test_a_run_cannot_end_before_where_it_is(workdir):
  with pytest.raises(
    ConfigError, match=r"steps = 29: .* is at step 30 already"
  ):
    workdir_lib.claim(workdir, make_config(steps=29), CORPUS, override=True)
  workdir_lib.claim(workdir, make_config(steps=30), CORPUS, override=True)


def test_overridable_fields_exist():
  fields = workdir_lib._flatten(config_lib.to_dict(make_config()))
  for name in workdir_lib.OVERRIDABLE_FIELDS:
    assert any(f"{field}.".startswith(f"{name}.") for field in fields), name
