"""Datasets of TensorFlow Datasets: slices, versions, and errors."""

import dataclasses
import os

import pytest

from ultramem_jax import data
from ultramem_jax.data.sources import Splits


def test_tfds_slices(corpora, texts, make_config, texts_of):
  for kind in ("array_record", "tfrecord"):
    settings = make_config(**corpora[kind]).data
    everything = texts_of(settings, "train")
    assert sorted(everything) == sorted(texts)
    part = dataclasses.replace(settings, train_split="train[20:30]")
    assert texts_of(part, "train") == everything[20:30]
    lanes = Splits(part).train.lanes(range(4), 4, seed=0)
    assert {next(lane) for lane in lanes for _ in range(9)} == set(
      everything[20:30]
    )
    newest = dataclasses.replace(settings, tfds_name="toy/en")
    assert texts_of(newest, "train") == everything


def test_tfds_errors(
  corpora, assert_refused, make_config, write_tfds, take, tmp_path
):
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
    "data.train_split = 'test': is not a split of",
    train_split="test",
    **settings,
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
    "data.text_field = 'body': is not a text feature of the dataset; known: ",
    text_field="body",
    **settings,
  )
  directory = write_tfds(tmp_path, "tfrecord")
  shard = sorted(directory.glob("toy-train*"))[1]
  shard.write_bytes(shard.read_bytes()[:-6])
  config = make_config(**settings | {"tfds_dir": str(tmp_path)})
  with pytest.raises(ValueError, match=r"00001-of-00004: ends inside record"):
    take(data.open(config).train(range(3)), 200)
  shard.unlink()
  settings = settings | {"tfds_dir": str(tmp_path)}
  assert_refused("is not whole: ", **settings)
  info = directory / "dataset_info.json"
  info.write_text(info.read_text()[:300])
  assert_refused("the metadata in", **settings)


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_tfds_without_text_is_refused(
  assert_refused, write_tfds, tmp_path, file_format
):
  write_tfds(tmp_path, file_format, [""] * 5)
  assert_refused(
    "data.train_split = 'train': holds no document with text",
    source="tfds",
    tfds_name="toy/en",
    tfds_dir=str(tmp_path),
  )
