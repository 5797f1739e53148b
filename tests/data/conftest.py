"""One small corpus as every kind of source."""

import gzip
import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard

from configs import default
from ultramem_jax.data.sources import Splits
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import ConfigError

KINDS = ["files", "jsonl", "gz", "zst", "array_record", "tfrecord"]
# Empty texts, one of a single byte, several as long as a row, and long ones.
TEXTS = ["", "a", "", "é" * 7, "x" * 14, "y" * 15, "z" * 16] + [
  f"{i}:" + "lorem ipsum " * (i % 7) for i in range(40)
]


@pytest.fixture(scope="session")
def make_config():
  """Makes a Config of byte tokens in rows of 16; `data` are its data fields."""

  def make(batch_size=3, seed=0, eval_batches=0, **data):
    c = default.get_config()
    c.update(batch_size=batch_size, seed=seed, eval_batches=eval_batches)
    c.data.update({"seq_len": 16, "shuffle_window": 12, **data})
    return config_lib.parse(c)

  return make


@pytest.fixture(scope="session")
def texts():
  """The documents of `corpora`."""
  return TEXTS


@pytest.fixture(scope="session")
def corpora(tmp_path_factory):
  """The data settings of the texts as every kind of source, by kind."""
  return {k: write_corpus(k, tmp_path_factory.mktemp(k)) for k in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
  """Each kind of source."""
  return request.param


@pytest.fixture(scope="session")
def write_tfds():
  """Writes the dataset toy/en:1.2.0 as write(folder, file_format, texts)."""
  return write_dataset


@pytest.fixture(scope="session")
def texts_of():
  """Reads the documents of a split as texts_of(data, "train" | "valid")."""
  return lambda data, split: list(getattr(Splits(data), split).documents())


@pytest.fixture(scope="session")
def assert_refused(make_config):
  """Checks the error with which a split of some data settings is opened."""

  def assert_refused(message, split="train", **settings):
    with pytest.raises(ConfigError) as caught:
      getattr(Splits(make_config(**settings).data), split)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)

  return assert_refused


@pytest.fixture(scope="session")
def take():
  """Takes count batches as take(batches, count)."""
  return lambda batches, count: list(itertools.islice(batches, count))


@pytest.fixture(scope="session")
def assert_equal_batches():
  """Compares two non-empty lists of batches."""

  def assert_equal(left, right):
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
      assert a.keys() == b.keys()
      for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)

  return assert_equal


def write_corpus(kind, path):
  """Writes TEXTS as a source of a kind; returns its data settings."""
  if kind in ("array_record", "tfrecord"):
    write_dataset(path, kind)
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


def write_dataset(path, file_format, texts=TEXTS):
  """Writes the dataset toy/en:1.2.0: texts to train on, their upper case."""

  class Toy(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    __module__ = "toy"  # so that TFDS does not look for files beside this one
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
