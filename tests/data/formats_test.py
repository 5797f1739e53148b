"""What a file holds, by its name and first bytes; others are refused."""

import bz2
import gzip
import io
import json
import lzma
import sqlite3
import tarfile
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import zstandard
from pyarrow import parquet

TEXTS = ["one", "zwei é", "x" * 40, "three\nlines\n", "漢字"]
LINES = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()


@pytest.fixture
def read(make_config, texts_of, tmp_path):
  """Returns the documents of a file of this name and content."""

  def read(name, content, **settings):
    path = tmp_path / name
    path.write_bytes(content)
    data = make_config(
      source="text", path=str(path), valid_path=str(path), **settings
    ).data
    return texts_of(data, "train")

  return read


@pytest.fixture
def refused(assert_refused, tmp_path):
  """Checks that a file of this name and content is refused by its name."""

  def refused(message, name, content, **settings):
    (tmp_path / name).write_bytes(content)
    path = str(tmp_path / name)
    for part in (f"data.path = {path!r}: {path}", message):
      assert_refused(part, source="text", path=path, **settings)

  return refused


def parquet_bytes(values, kind=None, **columns):
  stream = io.BytesIO()
  table = pa.table({"text": pa.array(values, kind), **columns})
  parquet.write_table(table, stream, row_group_size=2)
  return stream.getvalue()


@pytest.mark.parametrize(
  "suffix", ["", ".gz", ".GZ", ".zst", ".bz2", ".Bz2", ".xz"]
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL", "a.ndjson", "a.json"])
def test_lines_are_documents_whatever_the_case(read, name, suffix):
  pack = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
  }[suffix.lower()]
  # Two streams, as concatenated files have.
  packed = pack(LINES[:9]) + pack(LINES[9:])
  assert read(name + suffix, packed) == TEXTS
  assert read(f"b.txt{suffix}", pack(LINES)) == [LINES.decode()]


@pytest.mark.parametrize(
  "kind",
  [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())],
)
def test_rows_of_parquet_are_documents(read, kind):
  values = [*TEXTS[:2], "", *TEXTS[2:], TEXTS[0]]
  content = parquet_bytes(values, kind, text2=pa.array(range(7)))
  assert read("a.Parquet", content) == [*TEXTS, TEXTS[0]]
  # Rows are texts like files: long ones are cut.
  pieces = read("a.parquet", content, cut_bytes=10)
  assert "".join(pieces) == "".join(values)
  assert max(len(piece.encode()) for piece in pieces) == 10


def test_parquet_errors(assert_refused, refused, tmp_path):
  good = parquet_bytes(TEXTS)
  refused(": is not a whole Parquet file (", "cut.parquet", good[:-9])
  damaged = good[:10] + b"z" * 40 + good[50:]
  refused(": is not a whole Parquet file (", "damaged.parquet", damaged)
  refused(": is not a Parquet file, as its", "lines.parquet", LINES)
  for name, content, message in [
    ("null", parquet_bytes(["a", "b", None]), "is null in {}, row 3"),
    ("number", parquet_bytes([1, 2]), "is of type int64 in {}, not a string"),
    ("bytes", parquet_bytes([b"a"]), "is of type binary in {}, not a string"),
  ]:
    path = tmp_path / f"{name}.parquet"
    path.write_bytes(content)
    assert_refused(
      f"data.text_field = 'text': {message.format(path)}",
      source="text",
      path=str(path),
    )
  assert_refused(
    "data.text_field = 'body': is not in ",
    source="text",
    path=str(tmp_path / "null.parquet"),
    text_field="body",
  )


def archive():
  stream = io.BytesIO()
  with zipfile.ZipFile(stream, "w") as file:
    file.writestr("a.txt", "text")
  return stream.getvalue()


def tar():
  stream = io.BytesIO()
  with tarfile.open(fileobj=stream, mode="w") as file:
    file.addfile(tarfile.TarInfo("a.txt"))
  return stream.getvalue()


def array():
  stream = io.BytesIO()
  np.save(stream, np.arange(9))
  return stream.getvalue()


def arrow():
  stream = io.BytesIO()
  table = pa.table({"text": ["a"]})
  with pa.ipc.new_file(stream, table.schema) as writer:
    writer.write_table(table)
  return stream.getvalue()


def test_other_formats_are_refused_by_name(refused, tmp_path):
  with sqlite3.connect(tmp_path / "base") as base:
    base.execute("create table texts (text)")
  base.close()
  for content, message in [
    (gzip.compress(LINES), "holds gzip; name it .gz"),
    (zstandard.compress(LINES), "holds zstd; name it .zst"),
    (bz2.compress(LINES), "holds bzip2; name it .bz2"),
    (lzma.compress(LINES), "holds xz; name it .xz"),
    (parquet_bytes(TEXTS), "holds Parquet; name it .parquet"),
    (archive(), "holds zip; only text, JSON lines, Parquet and Arrow are read"),
    (tar(), "holds tar; only"),
    (array(), "holds npy; only"),
    (arrow(), "holds Arrow; only"),
    ((tmp_path / "base").read_bytes(), "holds SQLite; only"),
    (b"%PDF-1.7\n%\xc3\xa4", "holds PDF; only"),
    (b"\x89PNG\r\n\x1a\n", "holds PNG; only"),
    (b"\x89HDF\r\n\x1a\n", "holds HDF5; only"),
    ("text".encode("utf-16"), "holds UTF-16 text; convert it to UTF-8"),
    ("text".encode("utf-32"), "holds UTF-32 text; convert it to UTF-8"),
    (
      b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n",
      "holds a Git LFS pointer; fetch the file by git lfs pull",
    ),
    # No signature, but no text.
    ("text".encode("utf-16-le"), "holds NUL bytes, so it is not text"),
    (bytes(range(128, 256)) * 9, "bytes are not UTF-8; convert it"),
    (b"a script\n" * 99999 + b"\0\1\2", "holds NUL bytes"),
    ("élève\n".encode("latin-1") * 9, "18 of its 54 bytes are not UTF-8"),
  ]:
    for name in ("a.txt", "a.md", "a"):
      refused(message, name, content)
  for name in ("a.jsonl", "a.json", "a.txt.gz", "a.parquet"):
    refused("holds zip", name, archive())
  # What is packed is not text either.
  refused(": holds tar; only", "a.tar.gz", gzip.compress(tar()))
  refused(": holds PNG; only", "a.xz", lzma.compress(b"\x89PNG\r\n\x1a\n"))
  refused(": holds gzip; name", "a.gz.gz", gzip.compress(gzip.compress(b"a")))


def test_damaged_streams_are_refused(refused):
  """Cut, empty, or followed by what the libraries pass over in silence."""
  for suffix, name, pack in [
    (".gz", "gzip", gzip.compress),
    (".zst", "zstd", zstandard.compress),
    (".bz2", "bzip2", bz2.compress),
    (".xz", "xz", lzma.compress),
  ]:
    packed = pack(LINES * 99)
    file = f"a.jsonl{suffix}"
    refused(f": is not a whole {name} file (", file, packed[:-2])
    refused(f": is not a whole {name} file (", file, packed + b"more" * 99)
    refused(f": is not a {name} file, as", file, b"")
    refused(f": is not a {name} file, as", file, LINES)


def test_text_that_begins_like_a_format_is_text(read):
  for text in (
    "PARENTAL advice",
    "the ftyp box",
    "GIF89a is a format",
    "BZh",
    "PK",
    "MM",
    "ORC and Rar!",
  ):
    assert read("a.txt", text.encode()) == [text]


def test_a_byte_order_mark_is_no_text(read):
  assert read("a.txt", b"\xef\xbb\xbftext") == ["text"]
  assert read("a.txt.gz", gzip.compress(b"\xef\xbb\xbftext")) == ["text"]
  assert read("a.jsonl", b"\xef\xbb\xbf" + LINES) == TEXTS
  assert read("a.txt", b"text\xef\xbb\xbf") == ["text\ufeff"]


def test_json_that_is_no_lines_is_text(read, refused):
  pretty = json.dumps({"name": "package", "text": "a"}, indent=2)
  assert read("a.json", pretty.encode()) == [pretty]
  other = b'{"name": "package"}\n'
  assert read("a.json", other) == [other.decode()]
  documents = [{"id": 1, "text": "a"}, {"id": 2, "text": "b"}]
  for indent in (None, 2):
    content = json.dumps(documents, indent=indent).encode()
    refused(": is one array; write a line", "a.json", content)
  # Lines of documents, the first of which is damaged.
  refused(", line 1: is not JSON (", "a.json", b'{"text" "a"}\n' + LINES)


def test_nested_json_is_refused_in_a_line(refused):
  deep = b'{"text": ' + b"[" * 99999 + b"]" * 99999 + b"}\n"
  refused(", line 1: is not JSON (", "a.jsonl", deep)
  refused(", line 1: is not JSON (", "b.jsonl", b'{"text": ' + b"9" * 5000)
