"""Folders as `save_to_disk` of Hugging Face's `datasets` writes them."""

import json

import pyarrow as pa
import pytest

from ultramem_jax import data

TEXTS = ["one", "", "two é", "three", "four\n", "five"]


def save(folder, tables, **state):
  """Writes a saved dataset of a file for each table."""
  folder.mkdir(exist_ok=True)
  names = []
  for number, table in enumerate(tables):
    names.append(f"data-{number:05}-of-{len(tables):05}.arrow")
    with pa.ipc.new_stream(str(folder / names[-1]), table.schema) as writer:
      writer.write_table(table, max_chunksize=2)
  files = [{"filename": name} for name in names]
  state = {"_data_files": files, "_split": "train"} | state
  (folder / "state.json").write_text(json.dumps(state))
  (folder / "dataset_info.json").write_text('{"features": {}}')
  return folder


@pytest.fixture
def given(tmp_path):
  """The data settings of a saved dataset of two files."""
  parts = TEXTS[:3], TEXTS[3:]
  # Beside the text lies what JSON could not hold.
  tables = [pa.table({"n": [b"\xff"] * 3, "text": part}) for part in parts]
  folder = str(save(tmp_path / "train", tables))
  return {"source": "text", "path": folder, "valid_path": folder}


def test_rows_are_documents_in_order(given, make_config, texts_of):
  settings = make_config(**given).data
  assert texts_of(settings, "train") == [text for text in TEXTS if text]


def test_training_resumes_exactly(
  given, make_config, take, assert_equal_batches
):
  corpus = data.open(make_config(**given, prefetch=0))
  batches = corpus.train(range(3))
  take(batches, 4)
  state = json.dumps(batches.get_state())
  resumed = data.open(make_config(**given, prefetch=0)).train(range(3))
  resumed.set_state(json.loads(state))
  assert_equal_batches(take(resumed, 5), take(batches, 5))


def test_conversations_are_examples(tmp_path, make_config, texts_of):
  table = pa.table({"prompt": ["a", "b"], "answer": [" c", " d"]})
  folder = str(save(tmp_path / "train", [table]))
  config = make_config(
    source="text", path=folder, valid_path=folder, records="answers"
  )
  examples = texts_of(config.data, "train")
  assert [example.text for example in examples] == ["a c", "b d"]
  assert examples[0].answers == ((1, 3),)


def test_folders_that_are_not_whole_are_named(given, assert_refused, tmp_path):
  folder = tmp_path / "train"
  first = folder / "data-00000-of-00002.arrow"
  whole = first.read_bytes()
  # At the end, between two batches, and in the middle of one.
  for size in (len(whole) - 4, len(whole) - 8, len(whole) // 2, 20):
    first.write_bytes(whole[:size])
    assert_refused(f"{first}: is not a whole Arrow file (it ends", **given)
  first.write_bytes(b"text")
  assert_refused(f"{first}: is not a streamed Arrow file, as its", **given)
  first.unlink()
  assert_refused(f"state.json: {first} is missing", **given)
  state = {"_data_files": [{"filename": "../train/dataset_info.json"}]}
  (folder / "state.json").write_text(json.dumps(state))
  assert_refused("dataset_info.json' is not a file of this folder", **given)
  (folder / "state.json").write_text('{"_data_files": 3}')
  assert_refused("state.json: is damaged (TypeError: ", **given)


def test_selections_and_several_splits_are_refused(assert_refused, tmp_path):
  table = pa.table({"text": ["a"]})
  indices = [{"filename": "indices.arrow"}]
  folder = save(tmp_path / "a", [table], _indices_data_files=indices)
  assert_refused("a selection of rows", source="text", path=str(folder))
  (tmp_path / "dataset_dict.json").write_text('{"splits": ["a"]}')
  assert_refused(
    "holds several splits of a dataset; name the folder of one",
    source="text",
    path=str(tmp_path),
  )
