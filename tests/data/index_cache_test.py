"""What is remembered of files: nothing that is not so, and all that is."""

import gzip
import os

import pyarrow as pa
import pytest
from pyarrow import parquet

from ultramem_jax import data
from ultramem_jax.data import text_index

LONG_AGO = 10**18  # nanoseconds


@pytest.fixture
def start(make_config, tmp_path, monkeypatch):
  """Opens the files of a folder: (documents, inputs, how many were scanned)."""
  folder = tmp_path / "books"
  folder.mkdir()
  read = []
  for name in ("_scan_text", "_scan_lines"):
    original = getattr(text_index, name)

    def counting(path, *rest, original=original):
      read.append(path)
      return original(path, *rest)

    monkeypatch.setattr(text_index, name, counting)

  def start(**settings):
    read.clear()
    config = make_config(
      source="text", path=f"{folder}/*", valid_path=f"{folder}/*", **settings
    )
    cache = data.IndexCache(tmp_path / "index.npz")
    corpus = data.open(config, cache)
    inputs = corpus.inputs("train")
    documents = list(corpus._splits.train.documents())
    corpus.save_index()
    return documents, inputs, len(read)

  return start


def write(path, content):
  path.write_bytes(content)
  os.utime(path, ns=(LONG_AGO, LONG_AGO))


def test_known_files_are_not_read_again(start, tmp_path):
  books = tmp_path / "books"
  lines = b'{"text": "one"}\n\n{"text": "two"}\n'
  write(books / "a.txt", b"\xef\xbb\xbftext \xff")
  write(books / "b.jsonl", lines)
  write(books / "c.jsonl.gz", gzip.compress(lines))
  write(books / "d.txt.gz", gzip.compress(b"packed"))
  write(books / "e.txt", b"")
  table = pa.table({"text": ["row 1", "", "row 3"]})
  parquet.write_table(table, books / "f.parquet")
  os.utime(books / "f.parquet", ns=(LONG_AGO, LONG_AGO))
  first = start()
  assert first[0] == [
    "text \ufffd",
    "one",
    "two",
    "one",
    "two",
    "packed",
    "row 1",
    "row 3",
  ]
  assert first[2] > 0
  assert start() == (*first[:2], 0)
  # One more, one less.
  (books / "b.jsonl").unlink()
  write(books / "g.txt", b"new")
  documents, inputs, read = start()
  assert documents == [*first[0][:1], *first[0][3:], "new"] and read == 1
  assert "b.jsonl" not in inputs["data.path"]
  assert start() == (documents, inputs, 0)


@pytest.mark.parametrize("change", ["size", "time", "inode", "field"])
def test_changed_files_are_read_again(start, tmp_path, change):
  path = tmp_path / "books" / "a.jsonl"
  write(path, b'{"text": "some", "body": "else"}\n')
  documents, inputs, _ = start()
  assert documents == ["some"]
  if change == "field":
    assert start(text_field="body")[0] == ["else"]
    return
  text = "others" if change == "size" else "many"
  content = b'{"text": "%s", "body": "else"}\n' % text.encode()
  if change == "inode":
    write(tmp_path / "new", content)
    os.replace(tmp_path / "new", path)
  else:
    write(path, content)
  if change == "time":
    os.utime(path, ns=(LONG_AGO, LONG_AGO + 1))
  changed, others, read = start()
  assert changed == [text] and read == 1
  assert others != inputs


def test_files_that_have_just_been_written_are_not_trusted(start, tmp_path):
  """They could be written again within the resolution of the clock."""
  (tmp_path / "books" / "a.txt").write_text("text")
  for _ in range(2):
    assert start()[2] == 1
  assert not (tmp_path / "index.npz").exists()


def test_a_damaged_index_is_made_anew(start, tmp_path):
  write(tmp_path / "books" / "a.txt", b"text")
  first = start()
  index = tmp_path / "index.npz"
  whole = index.read_bytes()
  for damaged in (b"", b"text", whole[:-30], whole[: len(whole) // 2]):
    index.write_bytes(damaged)
    assert start() == first
    assert start()[2] == 0


def test_equal_sizes_and_counts_are_other_inputs(
  make_config, write_tfds, tmp_path
):
  """Of files and of datasets: what is exchanged for text alike is seen."""

  def inputs(**settings):
    return data.open(make_config(**settings)).inputs("train", "valid")

  files = {"source": "text", "path": f"{tmp_path}/*.txt"}
  for index in range(60):
    (tmp_path / f"{index}.txt").write_text(f"{index:02}")
  before = inputs(**files)
  assert before["data.tokenizer"] == {}
  assert before["data.path"]["7.txt"].startswith("2 bytes, ")
  for index in range(60):
    (tmp_path / f"{index}.txt").write_text(f"{59 - index:02}")
  after = inputs(**files)
  assert before.keys() == after.keys()
  assert not before["data.path"].items() & after["data.path"].items()

  folder = write_tfds(tmp_path / "data", "array_record")
  dataset = {
    "source": "tfds",
    "tfds_name": "toy/en",
    "tfds_dir": str(tmp_path / "data"),
  }
  before = inputs(**dataset)
  shard = sorted(folder.glob("toy-train*"))[1]
  shard.write_bytes(shard.read_bytes()[:-1] + b"?")
  after = inputs(**dataset)
  assert before["data.valid_split"] == after["data.valid_split"]
  changed = (
    before["data.train_split"].items() ^ after["data.train_split"].items()
  )
  assert {name for name, _ in changed} == {shard.name}
