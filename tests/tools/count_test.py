"""Counting what text reads: counts, going on, and merging."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tests.train import small_steps
from ultramem_jax import data, testing
from ultramem_jax.commands import model_flags
from ultramem_jax.runs import row_counts
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.tools import count

PATH = "memory_0/values"
NUM_ROWS = 64  # of which each stands for 4 virtual ones


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
  """Two files whose documents leave padding behind them."""
  folder = tmp_path_factory.mktemp("texts")
  for name in ("a", "b"):
    lines = [
      json.dumps({"text": f"{name}{i}" + "x" * (i % 4)}) for i in range(40)
    ]
    (folder / f"{name}.jsonl").write_text("\n".join(lines))
  return folder


@pytest.fixture(scope="module")
def loaded(texts, tmp_path_factory):
  config = testing.small_config(
    data__source="text",
    data__path=str(texts / "a.jsonl"),
    data__valid_path=str(texts / "b.jsonl"),
    data__packing="examples",
  )
  workdir = tmp_path_factory.mktemp("run") / "run"
  testing.save_run(workdir, config)
  return load_lib.load(workdir)


@pytest.fixture(autouse=True)
def _saves_often(monkeypatch):
  monkeypatch.setattr(count, "EVERY", 2)


def of_text(loaded, path):
  """The model with another text to count."""
  named = dataclasses.replace(loaded.config.data, path=str(path))
  config = dataclasses.replace(loaded.config, data=named)
  return loaded._replace(config=config)


def count_text(loaded, path, batches):
  return count.count_text(loaded, data.open(loaded.config), path, batches)


def reference(loaded, batches):
  """Counts from what the memory tells of its virtual rows."""
  reads_I, texts_I = np.zeros((2, NUM_ROWS), np.int64)
  feed = data.open(loaded.config).train(range(loaded.config.batch_size))
  forward = small_steps.forward(loaded.config.model)
  for _ in range(batches):
    batch = next(feed)
    _, sown = forward(loaded.variables, batch)
    slot_BTAM = np.asarray(sown["intermediates"]["memory_0"]["slot_BTAM"][0])
    assert (batch["segments"] == 0).any()
    for slot_TAM, segments_T in zip(slot_BTAM, batch["segments"], strict=True):
      rows = slot_TAM[segments_T > 0].ravel() % NUM_ROWS
      count_I = np.bincount(rows, minlength=NUM_ROWS)
      reads_I += count_I
      texts_I += count_I > 0
  return reads_I, texts_I


def test_counts_are_those_of_the_rows_read_and_go_on(loaded, tmp_path):
  path = tmp_path / "counts"
  counts = count_text(loaded, path, 3)
  reads_I, texts_I = reference(loaded, 3)
  np.testing.assert_array_equal(counts.reads[PATH], reads_I)
  np.testing.assert_array_equal(counts.texts[PATH], texts_I)
  assert 0 < texts_I.max() < reads_I.max()
  assert counts.num_texts == 3 * loaded.config.batch_size
  # Once more, and it has them; and on, from where it was.
  assert count_text(loaded, path, 3).num_texts == counts.num_texts
  counts = count_text(loaded, path, 5)
  reads_I, texts_I = reference(loaded, 5)
  np.testing.assert_array_equal(counts.reads[PATH], reads_I)
  np.testing.assert_array_equal(counts.texts[PATH], texts_I)
  held = row_counts.load(path, "--output")
  jax.tree.map(np.testing.assert_array_equal, held, counts)
  table = count.describe(counts)["tables"][PATH]
  assert table["reads"] == reads_I.sum() and table["rows"] == NUM_ROWS


def test_other_text_is_added_and_files_are_merged(loaded, texts, tmp_path):
  other = of_text(loaded, texts / "b.jsonl")
  both, one, two = (tmp_path / name for name in ("both", "one", "two"))
  first = count_text(loaded, one, 2)
  second = count_text(other, two, 1)
  count_text(loaded, both, 2)
  whole = count_text(other, both, 1)
  for kind in ("reads", "texts"):
    parts = getattr(first, kind)[PATH], getattr(second, kind)[PATH]
    np.testing.assert_array_equal(getattr(whole, kind)[PATH], sum(parts))
    assert (parts[0] != parts[1]).any()
  like = row_counts.empty(count.table_rows(loaded), loaded.step)
  merged = count.merge_files(tmp_path / "new", [str(one), str(two)], like)
  assert merged.sources == whole.sources
  jax.tree.map(np.testing.assert_array_equal, merged, whole)
  with pytest.raises(ConfigError, match=r"merge = .*b\.jsonl"):
    count.merge_files(both, [str(two)], like)


def test_counts_of_another_model_are_refused(loaded, tmp_path):
  path = tmp_path / "counts"
  count_text(loaded, path, 1)
  with pytest.raises(ConfigError, match="of step 7 reads, not that of step 8"):
    count_text(loaded._replace(step=8), path, 2)
  like = row_counts.empty({PATH: 16}, 7)
  with pytest.raises(ConfigError, match="counts other tables"):
    count.merge_files(tmp_path / "new", [str(path)], like)
  larger = dataclasses.replace(loaded.config, batch_size=8)
  with pytest.raises(ConfigError, match="batch_size = 8: must be 4"):
    count_text(loaded._replace(config=larger), path, 2)


def test_one_command_at_a_time_counts(tmp_path):
  path = tmp_path / "counts"
  refused = pytest.raises(ConfigError, match="another command is counting")
  with row_counts.locked(path), refused, row_counts.locked(path):
    pass
  with row_counts.locked(path), row_counts.locked(tmp_path / "others"):
    pass
  absent = pytest.raises(ConfigError, match="its folder does not exist")
  with absent, row_counts.locked(tmp_path / "none" / "counts"):
    pass


def test_text_of_which_a_part_is_held_out_is_another(loaded, tmp_path):
  """A place in it says nothing of the text as a whole."""
  lines = [json.dumps({"text": f"{i}"}) for i in range(200)]
  (tmp_path / "a.jsonl").write_text("\n".join(lines))
  asked = {"source": "text", "path": str(tmp_path / "a.jsonl")}
  for valid_path, sources in (("", 1), (asked["path"], 2), ("", 2)):
    config = model_flags.with_text(
      loaded.config, asked | {"valid_path": valid_path}, 0
    )
    counts = count.count_text(
      loaded._replace(config=config), data.open(config), tmp_path / "counts", 1
    )
    assert len(counts.sources) == sources


def test_nothing_of_the_run_is_mixed_into_other_text(loaded, texts):
  mixed = dataclasses.replace(
    loaded.config.data, mixture=f"{texts / 'b.jsonl'}=0.5"
  )
  config = dataclasses.replace(loaded.config, data=mixed)
  of_text = lambda asked: model_flags.with_text(config, asked, 0).data
  assert of_text({}) == mixed
  assert of_text({"packing": "segments"}).mixture == mixed.mixture
  assert of_text({"path": str(texts / "b.jsonl")}).mixture == ""
  assert of_text({"path": "c", "mixture": "d=0.1"}).mixture == "d=0.1"
  assert mixed.path and not of_text({"source": "stdlib"}).path
  dataset = of_text({"tfds_name": "c4/en", "packing": "segments"})
  assert (dataset.source, dataset.path) == ("tfds", "")
