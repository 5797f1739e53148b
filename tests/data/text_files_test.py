"""Text files: which documents they hold, and errors."""

import gzip

import pytest
import zstandard

from ultramem_jax import data


def test_files_are_found_below_directories_and_read_as_they_are(
  make_config, texts_of, tmp_path
):
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "a" / "b" / "one.txt").write_bytes(b"line\r\n\xff tail")
  (tmp_path / "two.txt.gz").write_bytes(gzip.compress(b"two"))
  (tmp_path / "three.txt.zst").write_bytes(zstandard.compress(b"three"))
  pattern = f"{tmp_path}/**/*.txt*"
  config = make_config(source="text", path=pattern, valid_path=pattern)
  assert texts_of(config.data, "train") == [
    "line\r\n\ufffd tail",
    "three",
    "two",
  ]
  assert data.open(config).describe() == (
    f"text {pattern}: 3 train documents, 0.0 MB; 3 validation documents, "
    "0.0 MB; validation documents that are in train, too: 3; "
    "bytes that are not UTF-8: 2"
  )


@pytest.mark.parametrize("compression", ["", ".gz"])
def test_only_the_train_split_cuts_long_files(
  make_config, texts_of, tmp_path, compression
):
  """At line ends where they fit, else between characters; nothing is lost."""
  texts = {
    "lines": "".join(f"line {i}\n" for i in range(40)),
    "one_line": "\u20ac" * 50,  # 3 bytes each, 16 bytes do not divide by 3
    "short": "short\n",
  }
  opener = gzip.open if compression else open
  for name, text in texts.items():
    with opener(tmp_path / f"{name}.txt{compression}", "wt") as file:
      file.write(text)
  glob = f"{tmp_path}/*"
  config = make_config(source="text", path=glob, valid_path=glob, cut_bytes=16)
  pieces = texts_of(config.data, "train")
  assert "".join(pieces) == "".join(texts[name] for name in sorted(texts))
  assert max(len(piece.encode()) for piece in pieces) <= 16
  lines = [piece for piece in pieces if piece.startswith("line")]
  assert len(lines) == 20 and all(piece.endswith("\n") for piece in lines)
  assert [p for p in pieces if "\u20ac" in p][:-1] == ["\u20ac" * 5] * 9
  assert texts_of(config.data, "valid") == [
    texts[name] for name in sorted(texts)
  ]
  assert "3 train documents" in data.open(config).describe()


def test_jsonl_oddities(make_config, texts_of, tmp_path):
  """Blank lines, an escaped half surrogate, no newline at the end."""
  (tmp_path / "a.jsonl").write_bytes(
    b'{"body": "one"}\n\n{"body": ""}\n{"body": "\\ud800 two"}'
  )
  pattern = str(tmp_path / "a.jsonl")
  config = make_config(
    source="text", path=pattern, valid_path=pattern, text_field="body"
  )
  assert texts_of(config.data, "train") == ["one", "? two"]


def test_text_errors(assert_refused, tmp_path):
  def refused(message, name, content, **settings):
    (tmp_path / name).write_bytes(content)
    pattern = str(tmp_path / name)
    assert_refused(
      message, source="text", path=pattern, valid_path=pattern, **settings
    )

  pattern = f"{tmp_path}/*.none"
  assert_refused(
    f"data.path = '{pattern}': matches no file", source="text", path=pattern
  )
  refused("holds no text: the 1 files there are empty", "empty.txt", b"")
  refused("holds no text", "empty.jsonl", b'\n{"text": ""}\n')
  good = b'{"text": "good", "url": "u"}\n'
  refused("bad.jsonl, line 2: is not JSON", "bad.jsonl", good + good[:9])
  refused("list.jsonl, line 1: is not an object", "list.jsonl", b"[1]\n")
  refused(
    "data.text_field = 'body': is not in",
    "field.jsonl",
    good,
    text_field="body",
  )
  refused("fields there: text, url", "field.jsonl", good, text_field="body")
  refused(
    "fields there: prompt, answer; prompts with answers need data.records = an",
    "pair.jsonl",
    b'{"prompt": "a", "answer": "b"}\n',
  )
  refused(
    "data.text_field = 'text': is not a string",
    "number.jsonl",
    b'{"text": 3}\n',
  )
  packed = gzip.compress(good * 999)
  refused("cut.jsonl.gz: is not a whole gzip", "cut.jsonl.gz", packed[:-9])
  refused("plain.txt.gz: is not a gzip file", "plain.txt.gz", good)
  packed = zstandard.compress(good * 999)
  refused("cut.jsonl.zst: is not a whole zstd", "cut.jsonl.zst", packed[:-3])
  refused("plain.txt.zst: is not a zstd file", "plain.txt.zst", good)
  (tmp_path / "one.txt").write_text("one")
  one = dict(source="text", path=f"{tmp_path}/one.txt")
  assert_refused(
    "leaves none of the 1 documents for train", valid_fraction=1 - 1e-9, **one
  )
  assert_refused(
    "data.valid_path = 'nowhere': matches no file",
    "valid",
    valid_path="nowhere",
    **one,
  )
