"""The opened corpus: what it says of itself, what it reads, what it refuses."""

import dataclasses
import sys

import pytest

from ultramem_jax import data
from ultramem_jax.data import text_index
from ultramem_jax.settings.errors import ConfigError


def test_small_vocabulary_is_refused(corpora, make_config):
  config = make_config(**corpora["files"])
  model = dataclasses.replace(config.model, vocab_size=200)
  config = dataclasses.replace(config, model=model)
  with pytest.raises(ConfigError, match=r"model.vocab_size = 200"):
    data.open(config)


def test_the_standard_library_is_described(make_config, texts_of):
  config = make_config()
  corpus = data.open(config)
  train, valid = (
    len(texts_of(config.data, split)) for split in ("train", "valid")
  )
  line = corpus.describe()
  version = ".".join(map(str, sys.version_info[:3]))
  assert line.startswith(f"stdlib of CPython {version}: {train} train files, ")
  assert f"; {valid} validation files, " in line


def test_a_dataset_is_described(corpora, texts, make_config):
  corpus = data.open(make_config(**corpora["array_record"]))
  assert corpus.describe().startswith(
    f"tfds toy/en:1.2.0: {len(texts)} train documents, 0.0 MB; "
  )


def test_files_are_indexed_once(corpora, make_config, monkeypatch):
  """For a description and batches of both splits, which share the files."""
  indexed = []
  index = text_index.index

  def counting(files, *arguments):
    indexed.extend(file.path for file in files)
    return index(files, *arguments)

  monkeypatch.setattr(text_index, "index", counting)
  corpus = data.open(make_config(**corpora["files"] | {"valid_path": ""}))
  assert indexed == []
  corpus.describe()
  next(corpus.train(range(3)))
  next(iter(corpus.valid(range(3))))
  assert indexed and len(set(indexed)) == len(indexed)


def test_evaluation_needs_no_text_to_train_on(corpora, make_config):
  corpus = data.open(make_config(**corpora["files"] | {"path": "nowhere"}))
  assert list(corpus.valid(range(3)))
  with pytest.raises(ConfigError, match=r"data.path = 'nowhere'"):
    corpus.train(range(3))
  with pytest.raises(ConfigError, match=r"data.path = 'nowhere'"):
    corpus.describe()
