"""Commands of a run whose data or tokenizer have changed."""

import dataclasses
import json
import os
import pathlib

import pytest

from ultramem_jax import data, testing
from ultramem_jax.data import train_bpe
from ultramem_jax.runs import checkpoint, row_counts
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.errors import CheckpointError, ConfigError
from ultramem_jax.tools import derived_run, quantize, training

TEXT = "a line of text\n"
LONG_AGO = 10**18  # nanoseconds


@pytest.fixture
def run(tmp_path):
  """(config, workdir) of a run with a tokenizer; step 7 is saved."""
  (tmp_path / "input.txt").write_text(TEXT * 99)
  tokenizer = train_bpe.train([TEXT], 264)
  tokenizer.save(str(tmp_path / "tokenizer.json"))
  config = testing.small_config(
    data__source="text",
    data__path=str(tmp_path / "input.txt"),
    data__tokenizer=str(tmp_path / "tokenizer.json"),
  )
  workdir = str(tmp_path / "run")
  opened = training.open_corpus(config, workdir)
  testing.save_run(workdir, config, opened.described)
  training.bind_workdir(workdir, config, opened, training.NOTHING)
  return config, workdir


def permute(path):
  """Exchanges the ids of two tokens; the file keeps its size."""
  content = json.loads(path.read_text())
  vocabulary = content["model"]["vocab"]
  vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
  path.write_text(json.dumps(content))


@pytest.mark.parametrize("changed", ["data.path", "data.tokenizer"])
def test_training_names_what_has_changed(run, tmp_path, changed, capsys):
  config, workdir = run
  opened = training.open_corpus(config, workdir)
  training.bind_workdir(workdir, config, opened, training.NOTHING)
  if changed == "data.path":
    (tmp_path / "input.txt").write_text(TEXT.swapcase() * 99)
    file = "input.txt"
  else:
    permute(tmp_path / "tokenizer.json")
    file = "tokenizer.json"
  now = training.open_corpus(config, workdir)
  assert now.described == opened.described  # sizes and counts do not tell
  with pytest.raises(ConfigError) as caught:
    training.train(config, workdir)
  message = f"the data of this run have changed: {changed}: {file} has changed"
  assert message in str(caught.value)
  assert "--accept_changed_data" in str(caught.value)
  training.bind_workdir(workdir, config, now, training.Accepted(data=True))
  assert message in capsys.readouterr().out
  training.bind_workdir(workdir, config, now, training.NOTHING)


def test_a_run_that_is_trained_elsewhere_keeps_its_settings(run):
  """Even with --override: its own command would be refused later."""
  config, workdir = run
  opened = training.open_corpus(config, workdir)
  longer = dataclasses.replace(config, steps=config.steps + 1)
  accepted = training.Accepted(settings=True, data=True)
  record = pathlib.Path(workdir, "config.json")
  before = record.read_bytes()
  with checkpoint.Checkpointer(workdir, 1):
    with pytest.raises(CheckpointError, match="another process"):
      training.bind_workdir(workdir, longer, opened, accepted)
    assert record.read_bytes() == before
  training.bind_workdir(workdir, longer, opened, accepted)
  assert record.read_bytes() != before


def test_settings_that_change_before_the_workdir_is_locked_are_named(
  run, monkeypatch
):
  config, workdir = run
  other = dataclasses.replace(config, steps=config.steps + 1)

  def another_start(config, layout, memory, described, workdir):
    workdir_lib.claim(workdir, other, described, override=True)

  monkeypatch.setattr(training, "announce", another_start)
  with pytest.raises(ConfigError, match=f"steps = {config.steps}, held: "):
    training.train(config, workdir)


def test_training_names_counts_of_rows_that_have_changed(run, tmp_path):
  config, _ = run
  path = tmp_path / row_counts.FILE_NAME
  counts = row_counts.empty({"memory_0/values": 64}, step=7)
  row_counts.save(path, counts)
  optim = dataclasses.replace(
    config.optim, table_rows="kl", table_counts=str(tmp_path)
  )
  config = dataclasses.replace(config, optim=optim)
  workdir = str(tmp_path / "chosen")
  opened = training.open_corpus(config, workdir)
  training.bind_workdir(workdir, config, opened, training.NOTHING)
  row_counts.save(path, counts._replace(num_texts=5))
  with pytest.raises(ConfigError, match=r"table_counts: .* has changed"):
    training.train(config, workdir)
  path.unlink()
  with pytest.raises(
    ConfigError, match=r"optim\.table_counts = .*no such file"
  ):
    training.train(config, workdir)


def test_a_model_is_served_with_the_tokenizer_that_it_learned(run, tmp_path):
  _, workdir = run
  path = tmp_path / "tokenizer.json"
  before = data.open(load_lib.load(workdir).config).tokenizer.encode("a eel")
  permute(path)
  loaded = load_lib.load(workdir).config
  assert (data.open(loaded).tokenizer.encode("a eel") == before).all()
  path.unlink()
  assert (data.open(loaded).tokenizer.encode("a eel") == before).all()
  # What the workdir is bound to stays as it was given.
  assert workdir_lib.load_config(workdir).data.tokenizer == str(path)


def test_evaluation_names_what_has_changed(run, tmp_path):
  _, workdir = run
  (tmp_path / "input.txt").write_text(TEXT.swapcase() * 99)
  status, output, errors = testing.finish(
    testing.start(["eval.py", f"--workdir={workdir}"])
  )
  assert status == 2 and output == ""
  assert errors.startswith(
    f"error: {workdir}: the data of this run have changed: data.path: input.txt"
  )
  assert errors.count("\n") == 1
  with pytest.raises(ConfigError, match=r"data.path: input.txt has changed"):
    quantize.quantize_run(
      load_lib.load(workdir), workdir, tmp_path / "output", "int8"
    )
  assert not (tmp_path / "output").exists()


def test_the_index_is_kept_in_the_workdir(run, tmp_path):
  config, workdir = run
  os.utime(tmp_path / "input.txt", ns=(LONG_AGO, LONG_AGO))
  opened = training.open_corpus(config, workdir)
  training.bind_workdir(workdir, config, opened, training.NOTHING)
  assert os.path.exists(f"{workdir}/index.npz")
  assert training.open_corpus(config, workdir).described == opened.described


def test_a_run_goes_on_with_its_own_tokenizer_if_the_other_is_gone(
  run, tmp_path
):
  config, workdir = run
  before = training.open_corpus(config, workdir)
  (tmp_path / "tokenizer.json").unlink()
  opened = training.open_corpus(config, workdir)
  assert (
    opened.corpus.tokenizer.encode("a line")
    == before.corpus.tokenizer.encode("a line")
  ).all()
  training.bind_workdir(workdir, config, opened, training.NOTHING)
  with pytest.raises(ConfigError, match="no such file"):
    training.open_corpus(config, str(tmp_path / "another"))


def test_changed_data_leave_the_settings_of_a_run_as_they_were(run, tmp_path):
  config, workdir = run
  before = (tmp_path / "run" / "config.json").read_bytes()
  (tmp_path / "input.txt").write_text(TEXT.swapcase() * 99)
  longer = dataclasses.replace(config, steps=config.steps + 1)
  with pytest.raises(ConfigError, match="have changed"):
    training.train(longer, workdir, accepted=training.Accepted(settings=True))
  assert (tmp_path / "run" / "config.json").read_bytes() == before


def test_what_is_made_of_a_run_keeps_its_tokenizer(run, tmp_path):
  _, workdir = run
  loaded = load_lib.load(workdir)
  before = data.open(loaded.config).tokenizer.encode("a eel").tolist()
  bound = workdir_lib.load_config(workdir)
  derived_run.write(tmp_path / "made", workdir, bound, loaded.variables)
  (tmp_path / "tokenizer.json").unlink()
  made = data.open(load_lib.load(tmp_path / "made").config)
  assert made.tokenizer.encode("a eel").tolist() == before
