"""Datasets of TensorFlow Datasets that are damaged, or that name other code."""

import json
import os
import sys

import pytest

from ultramem_jax import data
from ultramem_jax.data.sources import Splits
from ultramem_jax.settings.errors import DataError


@pytest.fixture
def dataset(write_tfds, make_config, tmp_path):
  """Writes a dataset: (its folder, its data settings)."""

  def write(file_format="array_record"):
    settings = {
      "source": "tfds",
      "tfds_name": "toy/en",
      "tfds_dir": str(tmp_path),
    }
    return write_tfds(tmp_path, file_format), settings

  return write


@pytest.mark.parametrize("file_format", ["array_record", "tfrecord"])
def test_a_damaged_file_is_named(dataset, make_config, file_format):
  folder, settings = dataset(file_format)
  source = Splits(make_config(**settings).data).train
  shard = sorted(folder.glob("toy-train*"))[1]
  whole = shard.read_bytes()
  for damaged in (
    whole[:-100],
    b"",
    whole[:200] + b"z" * 100 + whole[300:],
    # The framing of a TFRecord stays whole.
    whole.replace(b"text", b"\xff" * 4),
    whole.replace(b"text", b"next"),
  ):
    shard.write_bytes(damaged)
    for read in (
      lambda: list(source.documents()),
      lambda: [next(lane) for lane in source.lanes([0], 1, 0) * 99],
    ):
      with pytest.raises(DataError) as caught:
        read()
      assert str(caught.value).startswith(f"{shard}: ")
      assert "\n" not in str(caught.value)


def test_features_are_those_of_the_library(dataset, assert_refused, tmp_path):
  """TFDS would import the module of any class that the file names."""
  folder, settings = dataset()
  path = folder / "features.json"
  good = json.loads(path.read_text())
  name = "pythonClassName"
  (tmp_path / "bad.py").write_text("raise SystemExit('imported')")
  sys.path.insert(0, str(tmp_path))
  inner = {"x": {"type": "bad.Text", "content": "{}"}}
  for wrong in (
    {**good, name: "bad.FeaturesDict"},
    {"python_class_name": "bad.FeaturesDict", **good},
    {"type": "bad.FeaturesDict", "content": {}},
    {"type": good[name], "content": {"features": inner}},
    {name: good[name], "jsonFeature": {"json": json.dumps(inner)}},
    {**good, "featuresDict": {"features": {"text": {name: "bad.Text"}}}},
    # Of the same library, but no feature.
    {**good, name: "tensorflow_datasets.core.features.feature_test.AnInput"},
  ):
    path.write_text(json.dumps(wrong))
    assert_refused("which is not a class of tfds.features)", **settings)
  path.write_text("[" * 99999)
  assert_refused("cannot be read (", **settings)
  path.unlink()
  assert_refused("there is no features.json", **settings)
  os.mkfifo(path)
  assert_refused("there is no features.json", **settings)
  sys.path.remove(str(tmp_path))
  assert "bad" not in sys.modules


def test_slices_that_overlap_are_told(dataset, make_config):
  _, settings = dataset()

  def described(train, valid):
    config = make_config(**settings, train_split=train, valid_split=valid)
    return data.open(config).describe()

  assert "both splits" not in described("train", "validation")
  assert "both splits" not in described("train[:30]", "train[30:]")
  assert described("train", "train[20:25]").endswith(
    "; examples in both splits: 5"
  )
  assert described("train[:20]+train[40:]", "train[15:42]").endswith(
    "; examples in both splits: 7"
  )
