"""Sources and batches: what is read, how it is packed, and resuming."""

import dataclasses
import gzip
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard

from configs import default
from ultramem_jax.data import convert, packing, pipeline, sources
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import ConfigError

PAD, BOS, EOS = 256, 257, 258
# Empty texts, one of a single byte, several as long as a row, and long ones.
TEXTS = ["", "a", "", "é" * 7, "x" * 14, "y" * 15, "z" * 16] + [
  f"{i}:" + "lorem ipsum " * (i % 7) for i in range(40)
]


def make(batch_size=3, seed=0, eval_batches=0, **data):
  """A Config of byte tokens in rows of 16."""
  c = default.get_config()
  c.update(batch_size=batch_size, seed=seed, eval_batches=eval_batches)
  c.data.update({"seq_len": 16, "shuffle_window": 12, **data})
  return config_lib.parse(c)


def build_tfds(path, file_format, texts=TEXTS):
  """Writes the dataset toy/en:1.2.0: texts to train on, their upper case."""

  class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="en", version="1.2.0"),)

    def _info(self):
      features = {"text": tfds.features.Text(), "id": tfds.features.Text()}
      return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features)
      )

    def _split_generators(self, dl_manager):
      return {
        "train": self._generate_examples(texts),
        "validation": self._generate_examples(map(str.upper, texts)),
      }

    def _generate_examples(self, values):
      for number, text in enumerate(values):
        yield number, {"text": text, "id": str(number)}

  builder = Toy(config="en", data_dir=path)
  builder.download_and_prepare(
    file_format="array_record",
    download_config=tfds.download.DownloadConfig(num_shards=4),
  )
  directory = Path(builder.data_dir)
  if file_format == "tfrecord":
    to_tfrecord(builder.info, directory)
  return directory


def to_tfrecord(info, directory):
  """Rewrites the shards in TFRecord framing, checksums left zero."""
  raw = tfds.decode.DeserializeMethod.RAW_BYTES
  for split in info.splits.values():
    builder = tfds.builder_from_directory(str(directory))
    examples = builder.as_data_source(split.name, deserialize_method=raw)
    start = 0
    for path, length in zip(split.filepaths, split.shard_lengths, strict=True):
      framed = [
        len(examples[i]).to_bytes(8, "little")
        + bytes(4)
        + examples[i]
        + bytes(4)
        for i in range(start, start + length)
      ]
      start += length
      name = Path(path).name.replace(".array_record", ".tfrecord")
      (directory / name).write_bytes(b"".join(framed))
  for path in directory.glob("*.array_record*"):
    path.unlink()
  info_path = directory / "dataset_info.json"
  text = info_path.read_text().replace("array_record", "tfrecord")
  info_path.write_text(text)


def write_corpus(kind, path):
  """Writes TEXTS as a source of a kind; returns its data settings."""
  if kind in ("array_record", "tfrecord"):
    build_tfds(path, kind)
    return {
      "source": "tfds",
      "tfds_name": "toy/en:1.2.0",
      "tfds_dir": str(path),
    }
  lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()
  if kind == "files":
    for i, text in enumerate(TEXTS):
      (path / f"{i:02}.txt").write_text(text)
  elif kind == "jsonl":
    (path / "a.jsonl").write_bytes(lines)
  elif kind == "gz":
    (path / "a.jsonl.gz").write_bytes(gzip.compress(lines))
  elif kind == "zst":
    half = len(lines) // 2  # of two frames, as concatenated files have
    (path / "a.jsonl.zst").write_bytes(
      zstandard.compress(lines[:half]) + zstandard.compress(lines[half:])
    )
  pattern = str(path / "*")
  return {"source": "text", "path": pattern, "valid_path": pattern}


KINDS = ["files", "jsonl", "gz", "zst", "array_record", "tfrecord"]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
  """The data settings of TEXTS as every kind of source."""
  return {k: write_corpus(k, tmp_path_factory.mktemp(k)) for k in KINDS}


def collect(batches, count):
  return list(itertools.islice(batches, count))


def assert_equal_batches(left, right):
  assert len(left) == len(right) > 0
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def slow_rows(texts, seq_len, mode):
  """Packs a finite corpus one token at a time; the reference."""
  stream = []  # (token, weight, bytes, document, place in it)
  for number, text in enumerate(filter(None, texts)):
    data = text.encode()
    n = len(data) + 1
    stream.append((BOS, 0, 0, number))
    for i, token in enumerate([*data, EOS]):
      size = (i + 1) * len(data) // n - i * len(data) // n
      stream.append((token, 1, size, number))
  rows = []
  for start in range(0, len(stream) - 1, seq_len):
    row = {
      k: []
      for k in (
        "tokens",
        "targets",
        "weights",
        "segments",
        "positions",
        "bytes",
      )
    }
    segment, position, document = 0, -1, None
    for i in range(start, start + seq_len):
      inside = i + 1 < len(stream) or i < len(stream)
      token, _, _, number = stream[i] if inside else (PAD, 0, 0, None)
      if inside and number != document:
        segment, position, document = segment + 1, -1, number
      position += 1
      target, weight, size, _ = (
        stream[i + 1] if i + 1 < len(stream) else (PAD, 0, 0, None)
      )
      row["tokens"].append(token)
      row["targets"].append(target)
      row["weights"].append(weight)
      row["bytes"].append(size)
      concat = mode == "concat"
      row["segments"].append((1 if concat else segment) if inside else 0)
      row["positions"].append(
        i - start if concat else position if inside else 0
      )
    rows.append(row)
  return rows


@pytest.mark.parametrize("mode", ["segments", "concat"])
@pytest.mark.parametrize("seq_len", [1, 2, 15, 16, 17, 300])
def test_validation_packs_as_the_slow_reference(corpora, mode, seq_len):
  config = make(packing=mode, **corpora["jsonl"] | {"seq_len": seq_len})
  rows = slow_rows(TEXTS, seq_len, mode)
  batches = list(pipeline.valid_batches(config, range(3)))
  assert len(batches) == -(-len(rows) // 3)
  for number, batch in enumerate(batches):
    for name, values_BT in batch.items():
      weights = name == "weights"
      assert values_BT.dtype == (np.float32 if weights else np.int32)
      assert values_BT.shape == (3, seq_len)
      wanted = [row[name] for row in rows[3 * number : 3 * number + 3]]
      np.testing.assert_array_equal(values_BT[: len(wanted)], wanted, name)
  for name, values_BT in batches[-1].items():
    padding = PAD if name in ("tokens", "targets") else 0
    empty = values_BT[len(rows) - 3 * len(batches) or 3 :]
    if not (name == "positions" and mode == "concat"):
      assert (empty == padding).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_validation_covers_every_byte_once(corpora, kind):
  config = make(**corpora[kind])
  valid = pipeline.valid_batches(config, range(3))
  batches = list(valid)
  texts = [t.upper() if "record" in kind else t for t in TEXTS]
  assert sum(int(b["bytes"].sum()) for b in batches) == sum(
    len(text.encode()) for text in texts
  )
  # Targets that count: every byte and one eos per document.
  targets = [b["targets"][b["weights"] == 1] for b in batches]
  counts = np.bincount(np.concatenate(targets), minlength=259)
  wanted = np.bincount(list("".join(texts).encode()), minlength=259)
  wanted[EOS] = sum(map(bool, texts))
  if "record" not in kind:
    np.testing.assert_array_equal(counts, wanted)
  else:  # the writer shuffles, which moves no text out of a split
    np.testing.assert_array_equal(np.sort(counts), np.sort(wanted))
  assert_equal_batches(batches, list(valid))


def test_bytes_are_exact_with_tokens_of_many_bytes():
  """A long text of few tokens: no overflow, every byte given away."""
  document = packing.Document(np.zeros(1001, np.int32), 2**40 + 12345)
  whole = packing.byte_counts(packing.Piece(document, 0, 1001))
  assert whole[0] == 0 and whole.sum() == 2**40 + 12345
  parts = [packing.Piece(document, 0, 7), packing.Piece(document, 7, 1001)]
  np.testing.assert_array_equal(
    np.concatenate([packing.byte_counts(p) for p in parts]), whole
  )


def test_eval_batches_limits_validation(corpora):
  config = make(eval_batches=2, **corpora["jsonl"])
  everything = make(**corpora["jsonl"])
  assert_equal_batches(
    list(pipeline.valid_batches(config, range(3))),
    collect(pipeline.valid_batches(everything, range(3)), 2),
  )


def train_stream(batches, lane):
  """The tokens of a lane in order, each once; checks the overlap."""
  for before, after in itertools.pairwise(batches):
    assert before["targets"][lane, -1] == after["tokens"][lane, 0]
  return np.concatenate([b["tokens"][lane] for b in batches])


def documents_in(stream):
  """The whole documents of a lane's stream, as bytes."""
  parts = "".join(map(chr, stream)).split(chr(BOS))[1:-1]
  assert all(part.endswith(chr(EOS)) for part in parts)
  return [bytes(map(ord, part[:-1])) for part in parts]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_holds_each_document_once(corpora, kind):
  config = make(batch_size=1, **corpora[kind])
  batches = collect(pipeline.train_batches(config, range(1)), 400)
  found = documents_in(train_stream(batches, 0))
  wanted = sorted(t.encode() for t in TEXTS if t)
  epochs = [
    found[i : i + len(wanted)] for i in range(0, len(found), len(wanted))
  ][:-1]
  assert len(epochs) >= 2
  for epoch in epochs:
    assert sorted(epoch) == wanted
  assert epochs[0] != epochs[1] != wanted


@pytest.mark.parametrize("kind", KINDS)
def test_lanes_share_the_corpus(corpora, kind):
  """Three lanes see, in one epoch, every document once between them."""
  config = make(**corpora[kind])
  lanes = sources.load(config.data, "train").lanes(range(3), 3, seed=4)
  # Lanes of TFRecord files take turns in reading files of several documents.
  rounds = -(-len(TEXTS) // 3) if kind != "tfrecord" else len(TEXTS)
  seen = [[next(lane) for _ in range(rounds)] for lane in lanes]
  assert set(itertools.chain(*seen)) | {""} == set(TEXTS)
  assert seen[0] != seen[1] != seen[2]


@pytest.mark.parametrize("num_lanes", [1, 3, 4, 8, 11])
def test_lanes_of_record_files_share_an_epoch(corpora, num_lanes):
  """With fewer, as many and more lanes than the four files."""
  source = sources.load(make(**corpora["tfrecord"]).data, "train")
  num_parts = 4 * -(-num_lanes // 4)  # files, cut if lanes outnumber them
  found = []
  for lane in source.lanes(range(num_lanes), num_lanes, seed=2):
    text = next(lane)
    while lane.get_state()["part"] < num_parts:
      found.append(text)
      text = next(lane)
  assert sorted(found) == sorted(TEXTS)


def test_records_are_shuffled_within_windows_by_seed(corpora):
  settings = corpora["tfrecord"] | {"train_split": "train[:10]"}
  source = sources.load(make(shuffle_window=5, **settings).data, "train")
  in_order = list(source.documents())
  orders = []
  for seed in range(3):
    (lane,) = source.lanes(range(1), 1, seed)
    orders.append([next(lane) for _ in range(20)])
    for half in (slice(5), slice(5, 10)):
      assert sorted(orders[-1][half]) == sorted(in_order[half])
    assert orders[-1][:10] != orders[-1][10:]
  assert orders[0] != orders[1] != orders[2]


@pytest.mark.parametrize("mode", ["segments", "concat"])
def test_training_rows_are_marked_like_validation_rows(corpora, mode):
  """Weights, segments and positions follow from where bos stands."""
  config = make(packing=mode, **corpora["files"])
  for batch in collect(pipeline.train_batches(config, range(3)), 60):
    assert "bytes" not in batch
    begins_BT = batch["tokens"] == BOS
    begins_BT[:, 0] = True
    np.testing.assert_array_equal(
      batch["weights"], (batch["targets"] != BOS).astype(np.float32)
    )
    np.testing.assert_array_equal(
      batch["tokens"][:, 1:], batch["targets"][:, :-1]
    )
    segments_BT = np.cumsum(begins_BT, axis=1)
    start_BT = np.maximum.accumulate(np.arange(16) * begins_BT, axis=1)
    positions_BT = np.arange(16) - start_BT
    if mode == "concat":
      segments_BT, positions_BT[:] = np.ones_like(segments_BT), np.arange(16)
    np.testing.assert_array_equal(batch["segments"], segments_BT)
    np.testing.assert_array_equal(batch["positions"], positions_BT)


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_resume_is_exact_at_every_position(corpora, kind, prefetch):
  """Through JSON, in a fresh iterator, at 60 positions."""
  config = make(prefetch=prefetch, **corpora[kind])
  batches = pipeline.train_batches(config, range(3))
  made, states = [], []
  for _ in range(60):
    states.append(json.dumps(batches.get_state()))
    made.append(next(batches))
  batches.close()
  tokens = np.concatenate([b["tokens"] for b in made], axis=1)
  assert (tokens[:, ::16] == BOS).any() and (tokens[:, ::16] == EOS).any()

  resumed = pipeline.train_batches(config, range(3))
  for position, state in enumerate(states):
    resumed.set_state(json.loads(state))
    assert resumed.get_state() == json.loads(state)
    count = min(3, 60 - position)
    assert_equal_batches(
      collect(resumed, count), made[position : position + count]
    )
  resumed.close()


@pytest.mark.parametrize("kind", ["files", "tfrecord"])
def test_batches_do_not_depend_on_processes(corpora, kind):
  """Two processes make the halves of one process's batch, and hand over."""
  config = make(batch_size=6, **corpora[kind])
  one = pipeline.train_batches(config, range(6))
  two = [
    pipeline.train_batches(config, range(0, 2)),
    pipeline.train_batches(config, range(2, 6)),
  ]

  def joined(parts):
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

  assert_equal_batches(
    collect(one, 20), [joined([next(t) for t in two]) for _ in range(20)]
  )
  state = two[0].get_state() | two[1].get_state()
  assert state == one.get_state()
  three = [pipeline.train_batches(config, range(i, i + 2)) for i in (0, 2, 4)]
  for part in three:
    part.set_state(json.loads(json.dumps(state)))
  assert_equal_batches(
    collect(one, 5), [joined([next(t) for t in three]) for _ in range(5)]
  )
  valid = list(pipeline.valid_batches(config, range(6)))
  halves = [pipeline.valid_batches(config, r) for r in (range(2), range(2, 6))]
  assert_equal_batches(valid, [joined(p) for p in zip(*halves, strict=True)])


def test_state_without_a_lane_is_refused(corpora):
  batches = pipeline.train_batches(make(**corpora["files"]), range(3))
  state = batches.get_state()
  del state["1"]
  with pytest.raises(ValueError, match=r"lacks 1 lanes, such as 1"):
    batches.set_state(state)


@pytest.mark.parametrize("kind", ["files", "tfrecord"])
def test_order_depends_on_seed_alone(corpora, kind):
  def first(seed):
    config = make(seed=seed, **corpora[kind])
    return collect(pipeline.train_batches(config, range(3)), 9)

  assert_equal_batches(first(5), first(5))
  assert_equal_batches(first(2**32 - 1), first(2**32 - 1))
  assert any(
    (a["tokens"] != b["tokens"]).any()
    for a, b in zip(first(5), first(6), strict=True)
  )


@pytest.mark.parametrize("kind", KINDS)
def test_more_lanes_than_documents(corpora, kind):
  config = make(batch_size=100, **corpora[kind])
  batches = collect(pipeline.train_batches(config, range(100)), 4)
  assert all((b["segments"] > 0).all() for b in batches)


def test_error_in_the_thread_reaches_the_caller_and_repeats(tmp_path):
  """A file that vanishes raises at its batch, again when retried."""
  for i in range(3):
    (tmp_path / f"{i}.txt").write_text("word " * 20)
  pattern = str(tmp_path / "*.txt")
  config = make(source="text", path=pattern, valid_path=pattern)
  batches = pipeline.train_batches(config, range(3))
  for i in range(3):
    (tmp_path / f"{i}.txt").write_text("")
  for _ in range(2):
    with pytest.raises(ValueError, match=r"was cut short while in use"):
      collect(batches, 30)
  batches.close()


def test_an_iterator_left_open_exits_in_silence():
  code = (
    "import tests_config as t; from ultramem_jax.data import pipeline; "
    "i = pipeline.train_batches(t, range(8)); next(i)"
  )
  code = code.replace(
    "import tests_config as t",
    "from configs import tiny; from ultramem_jax import config; "
    "t = config.parse(tiny.get_config())",
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# Splits.


def texts_of(data, split):
  return list(sources.load(data, split).documents())


def test_stdlib_is_split_by_name():
  data = make().data
  train, valid = texts_of(data, "train"), texts_of(data, "valid")
  assert len(train) > 300 and 5 < len(valid) < len(train) / 10
  dataclass_module = Path(dataclasses.__file__).read_text()
  assert (dataclass_module in train) != (dataclass_module in valid)
  more = texts_of(dataclasses.replace(data, valid_fraction=0.2), "valid")
  assert len(more) > len(valid) and set(valid) < set(more)
  line = sources.describe(data)
  version = ".".join(map(str, sys.version_info[:3]))
  assert line.startswith(f"stdlib of CPython {version}: {len(train)} train ")
  assert f"; {len(valid)} validation files, " in line


@pytest.mark.parametrize("kind", ["files", "jsonl", "gz"])
def test_hash_split_is_disjoint_complete_and_stable(corpora, kind, tmp_path):
  settings = corpora[kind] | {"valid_path": "", "valid_fraction": 0.3}
  data = make(**settings).data
  train, valid = texts_of(data, "train"), texts_of(data, "valid")
  assert train and valid
  assert sorted(train + valid) == sorted(filter(None, TEXTS))
  # The same files elsewhere fall into the same halves.
  for path in Path(data.path).parent.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  moved = dataclasses.replace(data, path=str(tmp_path / "*"))
  assert texts_of(moved, "valid") == valid


def test_split_does_not_change_between_versions(tmp_path):
  """Pinned: a change of the rule would mix training and validation."""
  for i in range(12):
    (tmp_path / f"{i:02}.txt").write_text(f"{i:02}")
  data = make(source="text", path=f"{tmp_path}/*", valid_fraction=0.3).data
  assert texts_of(data, "valid") == ["00", "05", "06", "07", "09"]


def test_files_are_found_below_directories_and_read_as_they_are(tmp_path):
  (tmp_path / "a" / "b").mkdir(parents=True)
  (tmp_path / "a" / "b" / "one.txt").write_bytes(b"line\r\n\xff tail")
  (tmp_path / "two.txt.gz").write_bytes(gzip.compress(b"two"))
  (tmp_path / "three.txt.zst").write_bytes(zstandard.compress(b"three"))
  pattern = f"{tmp_path}/**/*.txt*"
  data = make(source="text", path=pattern, valid_path=pattern).data
  assert texts_of(data, "train") == ["line\r\n\ufffd tail", "three", "two"]
  assert sources.describe(data) == (
    f"text {pattern}: 3 train documents, 0.0 MB; 3 validation documents, 0.0 MB"
  )


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_long_files_are_cut_for_training_alone(tmp_path, packing):
  """At line ends where they fit, else between characters; nothing is lost."""
  texts = {
    "lines": "".join(f"line {i}\n" for i in range(40)),
    "one_line": "\u20ac" * 50,  # 3 bytes each, 16 bytes do not divide by 3
    "short": "short\n",
  }
  opener = gzip.open if packing else open
  for name, text in texts.items():
    with opener(tmp_path / f"{name}.txt{packing}", "wt") as file:
      file.write(text)
  glob = f"{tmp_path}/*"
  data = make(source="text", path=glob, valid_path=glob, cut_bytes=16).data
  pieces = list(sources.load(data, "train").documents())
  assert "".join(pieces) == "".join(texts[name] for name in sorted(texts))
  assert max(len(piece.encode()) for piece in pieces) <= 16
  lines = [piece for piece in pieces if piece.startswith("line")]
  assert len(lines) == 20 and all(piece.endswith("\n") for piece in lines)
  assert [p for p in pieces if "\u20ac" in p][:-1] == ["\u20ac" * 5] * 9
  assert list(sources.load(data, "valid").documents()) == [
    texts[name] for name in sorted(texts)
  ]
  assert "3 train documents" in sources.describe(data)


def test_jsonl_oddities(tmp_path):
  """Blank lines, an escaped half surrogate, no newline at the end."""
  (tmp_path / "a.jsonl").write_bytes(
    b'{"body": "one"}\n\n{"body": ""}\n{"body": "\\ud800 two"}'
  )
  pattern = str(tmp_path / "a.jsonl")
  data = make(
    source="text", path=pattern, valid_path=pattern, text_field="body"
  ).data
  assert texts_of(data, "train") == ["one", "? two"]


def test_tfds_slices(corpora):
  for kind in ("array_record", "tfrecord"):
    data = make(**corpora[kind]).data
    everything = texts_of(data, "train")
    assert sorted(everything) == sorted(TEXTS)
    part = dataclasses.replace(data, train_split="train[20:30]")
    assert texts_of(part, "train") == everything[20:30]
    lanes = sources.load(part, "train").lanes(range(4), 4, seed=0)
    assert {next(lane) for lane in lanes for _ in range(9)} == set(
      everything[20:30]
    )
    newest = dataclasses.replace(data, tfds_name="toy/en")
    assert texts_of(newest, "train") == everything
    assert sources.describe(data).startswith(
      f"tfds toy/en:1.2.0: {len(TEXTS)} train documents, 0.0 MB; "
    )


# Errors.


def assert_refused(message, split="train", **settings):
  with pytest.raises(ConfigError) as caught:
    sources.load(make(**settings).data, split)
  assert message in str(caught.value)
  assert "\n" not in str(caught.value)


def test_text_errors(tmp_path):
  def refused(message, name, data, **settings):
    (tmp_path / name).write_bytes(data)
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
    "data.text_field = 'text': is not a string",
    "number.jsonl",
    b'{"text": 3}\n',
  )
  packed = gzip.compress(good * 999)
  refused("cut.jsonl.gz: is not a whole gzip", "cut.jsonl.gz", packed[:-9])
  refused("plain.txt.gz: is not a whole gzip file", "plain.txt.gz", good)
  packed = zstandard.compress(good * 999)
  refused("cut.jsonl.zst: is not a whole zstd", "cut.jsonl.zst", packed[:-3])
  refused("plain.txt.zst: is not a zstd file", "plain.txt.zst", good)
  with open(tmp_path / "huge.txt", "wb") as file:
    file.truncate(70 << 20)  # holes: takes no room on disk
  assert_refused(
    "huge.txt: holds a document of 73 MB; at most 67 MB",
    source="text",
    path=str(tmp_path / "huge.txt"),
  )
  (tmp_path / "one.txt").write_text("one")
  one = dict(source="text", path=f"{tmp_path}/one.txt")
  assert_refused(
    "leaves no document for", "train", valid_fraction=1 - 1e-9, **one
  )
  assert_refused("of 1 in all", "valid", valid_fraction=1e-9, **one)
  assert_refused(
    "data.valid_path = 'nowhere': matches no file",
    "valid",
    valid_path="nowhere",
    **one,
  )


def test_tfds_errors(corpora, tmp_path):
  settings = corpora["tfrecord"]
  assert_refused(
    f"no dataset_info.json in {tmp_path}/toy/en/1.2.0; set data.tfds_dir "
    "to the local directory that holds toy/en/1.2.0",
    **settings | {"tfds_dir": str(tmp_path)},
  )
  assert_refused(
    f"in {os.path.expanduser('~/tensorflow_datasets')}/toy",
    **settings | {"tfds_dir": ""},
  )
  assert_refused(
    "data.train_split = 'test': is no split of", train_split="test", **settings
  )
  assert_refused(
    "known: train, validation, and slices", train_split="train[", **settings
  )
  assert_refused(
    "data.valid_split = 'train[:0]': holds no example",
    "valid",
    valid_split="train[:0]",
    **settings,
  )
  assert_refused(
    "data.text_field = 'body': is no text of the dataset; known: ",
    text_field="body",
    **settings,
  )
  directory = build_tfds(tmp_path, "tfrecord")
  shard = sorted(directory.glob("toy-train*"))[1]
  shard.write_bytes(shard.read_bytes()[:-6])
  config = make(**settings | {"tfds_dir": str(tmp_path)})
  with pytest.raises(ValueError, match=r"00001-of-00004: ends inside record"):
    collect(pipeline.train_batches(config, range(3)), 200)
  shard.unlink()
  settings = settings | {"tfds_dir": str(tmp_path)}
  assert_refused("is not whole: ", **settings)
  info = directory / "dataset_info.json"
  info.write_text(info.read_text()[:300])
  assert_refused("the metadata in", **settings)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_tfds_without_text_is_refused(tmp_path, file_format):
  build_tfds(tmp_path, file_format, [""] * 5)
  assert_refused(
    "data.train_split = 'train': holds no document with text",
    source="tfds",
    tfds_name="toy/en",
    tfds_dir=str(tmp_path),
  )


def test_small_vocabulary_is_refused(corpora):
  config = make(**corpora["files"])
  model = dataclasses.replace(config.model, vocab_size=200)
  config = dataclasses.replace(config, model=model)
  for batches in (pipeline.train_batches, pipeline.valid_batches):
    with pytest.raises(ConfigError, match=r"model.vocab_size = 200"):
      batches(config, range(3))


# The converter.


def test_converted_dataset_equals_its_source(corpora, tmp_path, capsys):
  data = make(**corpora["tfrecord"]).data
  target = tmp_path / "toy" / "en" / "1.2.0"
  convert.convert(Path(data.tfds_dir) / "toy" / "en" / "1.2.0", target)
  assert capsys.readouterr().out.startswith("1/8 ")
  converted = dataclasses.replace(data, tfds_dir=str(tmp_path))
  assert type(sources.load(converted, "train")) is not type(
    sources.load(data, "train")
  )
  for split in ("train", "valid"):
    assert texts_of(converted, split) == texts_of(data, split)
  assert [path.name for path in target.parent.iterdir()] == ["1.2.0"]


def test_convert_leaves_nothing_after_an_error(tmp_path):
  source = build_tfds(tmp_path / "source", "tfrecord")
  target = tmp_path / "target" / "1.2.0"
  shard = sorted(source.glob("toy-train*"))[2]
  whole = shard.read_bytes()
  for damaged, message in (
    (whole[:-1], "ends inside record"),
    (whole + whole, "goes on after"),
  ):
    shard.write_bytes(damaged)
    with pytest.raises(ValueError, match=f"00002-of-00004: {message}"):
      convert.convert(source, target)
    assert not list(target.parent.iterdir())
  shard.unlink()
  done = subprocess.run(
    [sys.executable, "-m", "ultramem_jax", "convert", source, target],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
  assert str(shard) in done.stderr
  assert not list(target.parent.iterdir())


def test_convert_refuses_what_it_cannot_do(corpora, tmp_path):
  with pytest.raises(ConfigError, match=r"SOURCE = .*no dataset_info.json"):
    convert.convert(tmp_path, tmp_path / "x")
  array = Path(corpora["array_record"]["tfds_dir"]) / "toy" / "en" / "1.2.0"
  with pytest.raises(ConfigError, match=r"holds array_record files"):
    convert.convert(array, tmp_path / "x")
  records = Path(corpora["tfrecord"]["tfds_dir"]) / "toy" / "en" / "1.2.0"
  with pytest.raises(ConfigError, match=r"TARGET = .*exists already"):
    convert.convert(records, tmp_path)
