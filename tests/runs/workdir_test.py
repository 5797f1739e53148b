"""Tests of what binds a workdir to one run."""

import dataclasses
import json
import re

import jax.numpy as jnp
import pytest

from configs import tiny
from ultramem_jax.runs import checkpoint, files
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import ConfigError

CORPUS = "standard library of Python 3.11.7"


def make_config(**overrides):
  config = tiny.get_config()
  config.update_from_flattened_dict(overrides)
  return config_lib.parse(config)


def test_claimed_config_is_read_back(tmp_path):
  workdir_lib.claim(tmp_path / "a" / "run", make_config(), CORPUS)
  assert workdir_lib.load_config(tmp_path / "a" / "run") == make_config()
  workdir_lib.claim(tmp_path / "a" / "run", make_config(), CORPUS)
  assert [p.name for p in (tmp_path / "a/run").iterdir()] == ["config.json"]


def test_another_config_is_refused(tmp_path):
  workdir_lib.claim(tmp_path, make_config(), CORPUS)
  other = make_config(
    **{"optim.eps": 0.5, "seed": 7, "log_every": 77, "eval_every": 78}
  )
  held = make_config()
  with pytest.raises(ConfigError) as error:
    workdir_lib.claim(tmp_path, other, CORPUS)
  assert re.search(
    f"seed = 7, held: {held.seed}; log_every = 77, held: {held.log_every}; "
    rf"eval_every = 78, held: {held.eval_every}; ... \(4 in all\). Use another "
    "--workdir, with init_from = .* for its parameters, or the held value",
    str(error.value),
  )
  assert workdir_lib.load_config(tmp_path) == held


def test_one_that_ended_before_a_checkpoint_says_so(tmp_path):
  workdir_lib.claim(tmp_path, make_config(), CORPUS)
  other = make_config(seed=7)
  with pytest.raises(ConfigError, match="no checkpoint yet: delete it"):
    workdir_lib.claim(tmp_path, other, CORPUS)
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  with pytest.raises(ConfigError, match=r"or the held value$"):
    workdir_lib.claim(tmp_path, other, CORPUS)


def test_free_fields_may_differ_and_the_file_stays(tmp_path):
  workdir_lib.claim(tmp_path, make_config(), CORPUS)
  other = make_config(
    **{
      "mesh.data": 1,
      "checkpoint.every": 3,
      "data.prefetch": 0,
      "sample.prompt": "x",
    }
  )
  assert other != make_config()
  workdir_lib.claim(tmp_path, other, CORPUS)
  assert workdir_lib.load_config(tmp_path) == make_config()


def test_free_fields_exist():
  flat = workdir_lib._flatten(dataclasses.asdict(make_config()))
  for free in workdir_lib.FREE_FIELDS:
    assert any(f"{name}.".startswith(f"{free}.") for name in flat)
  assert {name for name in flat if workdir_lib._is_free(name)} == {
    "checkpoint.every",
    "checkpoint.keep",
    "data.prefetch",
    "guard.max_skips",
    "guard.rollbacks",
    "mesh.data",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.table",
    "mesh.table_axes",
    "model.memory.storage.partition",
    "sample.prompt",
    "sample.num_tokens",
    "sample.temperature",
    "sample.top_k",
    "sample.top_p",
  }


def test_another_corpus_is_refused(tmp_path):
  workdir_lib.claim(tmp_path, make_config(), CORPUS)
  with pytest.raises(ConfigError) as error:
    workdir_lib.claim(tmp_path, make_config(), CORPUS.replace("11.7", "12.1"))
  message = str(error.value)
  assert "corpus = 'standard library of Python 3.12.1'" in message
  assert f"holds a run on {CORPUS!r}" in message
  assert "\n" not in message


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b'{"corpus": "x", "con',
    b"[]",
    b'"corpus config"',
    b"\xff\xfe",
    b'{"config": {}}',
    b'{"corpus": 1, "config": {}}',
    b"[" * 99999,
  ],
)
def test_damaged_config_is_refused(tmp_path, content):
  (tmp_path / "config.json").write_bytes(content)
  with pytest.raises(ConfigError, match=r"config.json is damaged"):
    workdir_lib.load_config(tmp_path)
  with pytest.raises(ConfigError, match=r"config.json is damaged"):
    workdir_lib.claim(tmp_path, make_config(), CORPUS)
  assert (tmp_path / "config.json").read_bytes() == content


def test_config_of_another_version_is_refused(tmp_path):
  workdir_lib.claim(tmp_path, make_config(), CORPUS)
  held = json.loads((tmp_path / "config.json").read_text())
  held["config"]["optim"]["momentum"] = 0.5
  del held["config"]["seed"]
  (tmp_path / "config.json").write_text(json.dumps(held))
  for read in (
    lambda: workdir_lib.load_config(tmp_path),
    lambda: workdir_lib.claim(tmp_path, make_config(), CORPUS),
  ):
    with pytest.raises(ConfigError) as error:
      read()
    assert re.search(
      r"config.json is not a config of this version "
      r"\((seed|optim.momentum) = .*\): use the version that wrote it, or "
      "start a new run in another --workdir$",
      str(error.value),
    )
    assert "\n" not in str(error.value)


def test_a_memory_with_flat_fields_is_of_another_version(tmp_path):
  workdir_lib.claim(tmp_path, make_config(), CORPUS)
  held = json.loads((tmp_path / "config.json").read_text())
  memory = held["config"]["model"]["memory"]
  memory.update(memory.pop("storage"), **memory.pop("imported"))
  (tmp_path / "config.json").write_text(json.dumps(held))
  with pytest.raises(
    ConfigError,
    match=r"this version \(model.memory.partition = 'auto': no such field.*"
    "use the version that wrote it",
  ):
    workdir_lib.load_config(tmp_path)


def test_missing_workdirs_are_named(tmp_path):
  with pytest.raises(ConfigError, match=r"absent': no such dir"):
    workdir_lib.load_config(tmp_path / "absent")
  with pytest.raises(ConfigError, match=r"holds no config.json"):
    workdir_lib.load_config(tmp_path)
  (tmp_path / "file").write_text("")
  for bad in (tmp_path / "file", "gs://bucket/run"):
    with pytest.raises(ConfigError, match="workdir = "):
      workdir_lib.claim(bad, make_config(), CORPUS)


def test_checkpoints_of_an_unknown_run_are_not_taken_over(tmp_path):
  (tmp_path / "checkpoints" / "10").mkdir(parents=True)
  with pytest.raises(ConfigError, match="checkpoints but no config"):
    workdir_lib.claim(tmp_path, make_config(), CORPUS)
  (tmp_path / "checkpoints" / "10").rmdir()
  workdir_lib.claim(tmp_path, make_config(), CORPUS)


@pytest.mark.parametrize(
  "name",
  ["[x]", "a[0-9]b/run", "a\\b", "\\", "x/[!]]/y", "a\udcff", "\udc80/x"],
)
def test_names_from_which_nothing_could_be_read_are_refused(tmp_path, name):
  workdir = tmp_path / name
  for use in (
    lambda: workdir_lib.claim(workdir, make_config(), CORPUS),
    lambda: workdir_lib.load_config(workdir),
  ):
    with pytest.raises(
      ConfigError, match=r"workdir = .*: must (have no|be te)"
    ):
      use()
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a*b?", "é", " ", "%41 {x}", "a[b", "b]"])
def test_names_from_which_all_is_read_are_taken(tmp_path, name):
  workdir_lib.claim(tmp_path / name, make_config(), CORPUS)
  with checkpoint.Checkpointer(tmp_path / name, 1) as saver:
    saver.save(1, {"params": {"x": jnp.ones(3)}}, {})
    assert saver.restore_latest({"params": {"x": jnp.zeros(3)}}).step == 1


def test_a_run_that_loses_its_config_is_told(tmp_path):
  workdir_lib.claim(tmp_path, make_config(), CORPUS)
  workdir_lib.require_claimed(tmp_path)
  (tmp_path / "config.json").unlink()
  with pytest.raises(ConfigError, match=r"lost its config.json while"):
    workdir_lib.require_claimed(tmp_path)


def test_a_link_that_waits_for_a_file_is_not_followed(tmp_path):
  victim = tmp_path / "victim"
  victim.write_text("precious")
  workdir = tmp_path / "run"
  workdir.mkdir()
  for name in ("config.json.tmp", "config.json.partial"):
    (workdir / name).symlink_to(victim)
  (workdir / "sha256.json").symlink_to(victim)
  workdir_lib.claim(workdir, make_config(), CORPUS)
  files.write_atomically(workdir / "sha256.json", b"{}")
  assert victim.read_text() == "precious"
  assert (workdir / "sha256.json").read_bytes() == b"{}"
