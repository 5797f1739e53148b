"""Splits of files: a single one, long ones, and text that is in both."""

import gzip
import os

import pytest

from ultramem_jax import data
from ultramem_jax.data import text_index
from ultramem_jax.data.sources import Splits
from ultramem_jax.settings.errors import ConfigError, DataError


@pytest.fixture
def make_data(make_config, tmp_path):
  """Makes the data settings of files in a folder."""

  def make(path="*", **settings):
    path = str(tmp_path / path)
    return make_config(source="text", path=path, **settings).data

  return make


def test_the_last_part_of_a_single_file_is_held_out(
  make_data, texts_of, tmp_path
):
  lines = "".join(f"line {i:03}\n" for i in range(100))
  for name, content, text, held_out in [
    ("input.txt", lines.encode(), lines, 4),
    ("input.txt.gz", gzip.compress(lines.encode()), lines, 4),
  ]:
    (tmp_path / name).write_bytes(content)
    settings = make_data(name)
    assert texts_of(settings, "train") == [text[: -9 * held_out]]
    assert texts_of(settings, "valid") == [text[-9 * held_out :]]
  half = make_data("input.txt", valid_fraction=0.5, cut_bytes=90)
  assert len(texts_of(half, "train")) == 5
  assert texts_of(half, "valid") == [lines[450:]]
  # A line that ends long before the part: between two characters.
  (tmp_path / "long.txt").write_text("title\n" + "word " * 100)
  settings = make_data("long.txt")
  assert texts_of(settings, "valid") == ["word " * 4]
  # One line.
  (tmp_path / "euro").write_text("\u20ac" * 50)
  settings = make_data("euro", valid_fraction=0.1)
  assert texts_of(settings, "train") == ["\u20ac" * 45]
  assert texts_of(settings, "valid") == ["\u20ac" * 5]


def test_the_last_part_of_each_of_few_files_is_held_out(
  make_config, make_data, texts_of, tmp_path
):
  """Of so few that the hash of their names leaves none to validate on."""
  for name in "abc":
    (tmp_path / name).write_text(f"{name}\n" * 50)
  settings = make_data()
  assert texts_of(settings, "train") == [f"{name}\n" * 48 for name in "abc"]
  assert texts_of(settings, "valid") == [f"{name}\n" * 2 for name in "abc"]
  config = make_config(source="text", path=settings.path)
  assert (
    data.open(config)
    .describe()
    .endswith(
      "3 validation documents, 0.0 MB; validation is the last part (0.04) of "
      "each text"
    )
  )


def test_lines_are_not_cut(assert_refused, tmp_path):
  (tmp_path / "a.jsonl").write_text('{"text": "a line of text"}\n')
  assert_refused(
    "data.valid_fraction = 0.04: leaves none of the 1 documents for valid",
    "valid",
    source="text",
    path=str(tmp_path / "a.jsonl"),
  )


def test_long_files_are_read_where_they_are_cut(
  make_data, monkeypatch, tmp_path
):
  monkeypatch.setattr(text_index, "MAX_DOCUMENT_BYTES", 1000)
  (tmp_path / "a.txt").write_text("a line\n" * 1000)
  splits = Splits(make_data("a.txt", valid_path=f"{tmp_path}/a.txt"))
  for split in ("train", "valid"):
    with pytest.raises(ConfigError) as caught:
      getattr(splits, split)
    assert str(caught.value) == (
      f"data.cut_bytes = 0: {tmp_path}/a.txt holds a document of 0 MB; set a "
      "number of bytes up to 1000, at which long texts are cut"
    )
  splits = Splits(
    make_data("a.txt", valid_path=f"{tmp_path}/a.txt", cut_bytes=99)
  )
  for split, longest in (("train", 98), ("valid", 994)):
    documents = list(getattr(splits, split).documents())
    assert "".join(documents) == "a line\n" * 1000
    assert max(map(len, documents)) == longest


def test_text_in_both_splits_is_counted(make_config, tmp_path):
  """Copies, in other formats too; links are not even read."""

  def described(**settings):
    config = make_config(source="text", path=f"{tmp_path}/train*", **settings)
    return data.open(config).describe()

  for index in range(60):
    (tmp_path / f"train_{index}.txt").write_text(f"text {index}\n")
  assert "in train, too" not in described()
  for index in range(60):
    (tmp_path / f"train_{index}_copy.txt").write_text(f"text {index}\n")
    os.link(tmp_path / f"train_{index}.txt", tmp_path / f"train_{index}_link")
    (tmp_path / f"train_{index}_sym").symlink_to(f"train_{index}.txt")
  assert "115 train documents" in described()
  assert described().endswith(
    "; validation documents that are in train, too: 5"
  )
  (tmp_path / "other").write_text("text\n")
  (tmp_path / "valid.jsonl.gz").write_bytes(
    gzip.compress(b'{"text": "text 1\\n"}\n{"text": "text"}\n')
  )
  assert described(valid_path=f"{tmp_path}/valid*").endswith(
    "; validation documents that are in train, too: 1"
  )
  assert "in train" not in described(valid_path=f"{tmp_path}/other")


def test_left_out_files_are_told(make_config, tmp_path):
  for index in range(60):
    (tmp_path / f"{index}.txt").write_text(f"text {index}\n")
  (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
  config = make_config(source="text", path=str(tmp_path))
  described = data.open(config).describe()
  assert "; files without text that are left out: 1, such as '" in described
  assert described.endswith(f"{tmp_path}/picture.png'")


def test_files_that_change_while_in_use_are_named(make_data, tmp_path):
  lines = '{"text": "some text"}\n' * 2
  for name, before, after, message in [
    ("a.txt", "some text", "other txt", "a.txt: was changed while in use"),
    ("a.txt", "some text", "some", "a.txt: was cut short while in use"),
    (
      "a.jsonl",
      lines,
      lines.replace("some", "more"),
      "a.jsonl: was changed while in use",
    ),
    (
      "a.jsonl",
      lines,
      lines.replace("{", "["),
      "a.jsonl, line 1: is not JSON (",
    ),
    (
      "a.jsonl",
      lines,
      lines.replace("text", "line"),
      "is not in .*a.jsonl, line 1; fields there: line; it was changed",
    ),
  ]:
    path = tmp_path / name
    path.write_text(before)
    source = Splits(make_data(name, valid_path=str(path))).train
    path.write_text(after)
    with pytest.raises(DataError) as caught:
      list(source.documents())
    assert "\n" not in str(caught.value)
    assert caught.match(message.replace("(", "[(]"))
    path.unlink()
    with pytest.raises(FileNotFoundError, match=name):
      list(source.documents())
