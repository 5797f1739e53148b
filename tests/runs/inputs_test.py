"""A run is bound to what it reads, and keeps its tokenizer."""

import pathlib

import pytest

from ultramem_jax import testing
from ultramem_jax.runs import inputs
from ultramem_jax.settings.errors import ConfigError

FILES = {f"{name}.txt": f"9 bytes, {name * 4}" for name in "abcdef"}
HELD = {"data.tokenizer": {}, "data.path": FILES}


@pytest.fixture
def tokenizer(tmp_path):
  """The files of a tokenizer, outside of the workdir."""
  folder = tmp_path / "published"
  folder.mkdir()
  files = {"tokenizer.json": "my.json", "tokenizer_config.json": "config"}
  for path in files.values():
    (folder / path).write_text(f"content of {path}")
  return {name: str(folder / path) for name, path in files.items()}


@pytest.fixture
def workdir(tmp_path):
  (tmp_path / "run").mkdir()
  return tmp_path / "run"


def test_the_same_inputs_are_accepted(workdir, tokenizer):
  for _ in range(2):
    assert inputs.bind(workdir, HELD, tokenizer, False) == ""
  assert sorted(path.name for path in workdir.rglob("*")) == [
    "inputs.json",
    "tokenizer",
    "tokenizer.json",
    "tokenizer_config.json",
  ]
  # A part of them, as evaluation reads.
  part = {"data.path": FILES}
  assert inputs.require_same(workdir, part, False) == ""


def test_what_else_lies_beside_the_tokenizer_is_left_alone(workdir, tokenizer):
  """A folder of one's own, or a link to it, from which the run reads."""
  published = pathlib.Path(tokenizer["tokenizer.json"]).parent
  (published / "model.safetensors").write_text("weights")
  (workdir / "tokenizer").symlink_to(published)
  read = {"data.tokenizer": {"my.json": "1 bytes, x"}}
  inputs.bind(workdir, read, {"my.json": str(published / "my.json")}, False)
  before = {path.name for path in published.iterdir()}
  changed = {"data.tokenizer": {"my.json": "2 bytes, y"}}
  inputs.bind(workdir, changed, {"my.json": str(published / "my.json")}, True)
  assert {path.name for path in published.iterdir()} == before
  assert "model.safetensors" in before


def test_changes_are_named_and_can_be_accepted(workdir, tokenizer):
  inputs.bind(workdir, HELD, tokenizer, False)
  files = {**FILES, "a.txt": "9 bytes, z", "g.txt": "1 bytes, g"}
  del files["b.txt"]
  given = {"data.tokenizer": {"tokenizer.json": "1 bytes, x"}}
  line = (
    "the data of this run have changed: data.tokenizer: tokenizer.json is new; "
    "data.path: a.txt has changed; data.path: b.txt is "
    "gone; ... (4 in all)"
  )
  for _ in range(2):
    with pytest.raises(ConfigError) as caught:
      inputs.bind(workdir, {**given, "data.path": files}, tokenizer, False)
    assert str(caught.value) == (
      f"{workdir}: {line}. Put back what it began with, use another --workdir, "
      "or continue anyway with --accept_changed_data"
    )
  assert inputs.require_same(workdir, HELD, False) == ""
  with open(tokenizer["tokenizer.json"], "w") as file:
    file.write("other")
  copy = workdir / "tokenizer" / "tokenizer.json"
  assert copy.read_text() == "content of my.json"
  given["data.path"] = files
  assert inputs.bind(workdir, given, tokenizer, True) == line
  assert copy.read_text() == "other"
  assert inputs.bind(workdir, given, tokenizer, False) == ""
  # A file beside the tokenizer that is gone is not part of the copy either.
  given["data.tokenizer"] = dict.fromkeys(tokenizer, "2 bytes, y")
  assert inputs.bind(workdir, given, tokenizer, True)
  given["data.tokenizer"] = {"tokenizer.json": "2 bytes, y"}
  del tokenizer["tokenizer_config.json"]
  assert inputs.bind(workdir, given, tokenizer, True)
  assert [path.name for path in copy.parent.iterdir()] == ["tokenizer.json"]


@pytest.mark.parametrize("content", ["", "[]", "{", '{"a": 1}', "[" * 99999])
def test_a_damaged_record_is_refused(workdir, content):
  (workdir / "inputs.json").write_text(content)
  with pytest.raises(ConfigError, match=r"inputs.json is damaged") as caught:
    inputs.bind(workdir, HELD, {}, True)
  assert "\n" not in str(caught.value)
  assert (workdir / "inputs.json").read_text() == content


def test_a_run_reads_the_tokenizer_of_its_workdir(workdir, tokenizer, tmp_path):
  config = testing.small_config(data__tokenizer=tokenizer["tokenizer.json"])
  assert inputs.own_tokenizer(config, workdir) == config  # of an older version
  inputs.bind(workdir, HELD, tokenizer, False)
  other = tmp_path / "copy"
  other.mkdir()
  inputs.copy(workdir, other)
  for folder in (workdir, other):
    own = inputs.own_tokenizer(config, folder)
    assert own.data.tokenizer == str(folder / "tokenizer")
    assert inputs.require_same(folder, HELD, False) == ""
  of_bytes = testing.small_config()
  assert inputs.own_tokenizer(of_bytes, workdir) == of_bytes
