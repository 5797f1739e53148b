"""Splits of every kind of source, and their lanes."""

import dataclasses
import itertools
from pathlib import Path

import pytest

from ultramem_jax.data.sources import Splits


def test_lanes_share_the_corpus(corpora, kind, texts, make_config):
  """Three lanes see, in one epoch, every document once between them."""
  config = make_config(**corpora[kind])
  lanes = Splits(config.data).train.lanes(range(3), 3, seed=4)
  # Lanes of TFRecord files take turns in reading files of several documents.
  rounds = -(-len(texts) // 3) if kind != "tfrecord" else len(texts)
  seen = [[next(lane) for _ in range(rounds)] for lane in lanes]
  assert set(itertools.chain(*seen)) | {""} == set(texts)
  assert len({tuple(x) for x in seen}) == 3


def test_stdlib_is_split_by_name(make_config, texts_of):
  data = make_config().data
  train, valid = texts_of(data, "train"), texts_of(data, "valid")
  assert len(train) > 300 and 5 < len(valid) < len(train) / 10
  dataclass_module = Path(dataclasses.__file__).read_text()
  assert (dataclass_module in train) != (dataclass_module in valid)
  more = texts_of(dataclasses.replace(data, valid_fraction=0.2), "valid")
  assert len(more) > len(valid) and set(valid) < set(more)


@pytest.mark.parametrize("kind", ["files", "jsonl", "gz"])
def test_hash_split_is_disjoint_complete_and_stable(
  corpora, kind, texts, make_config, texts_of, tmp_path
):
  settings = corpora[kind] | {"valid_path": "", "valid_fraction": 0.3}
  data = make_config(**settings).data
  train, valid = texts_of(data, "train"), texts_of(data, "valid")
  assert train and valid
  assert sorted(train + valid) == sorted(filter(None, texts))
  # The same files elsewhere fall into the same halves.
  for path in Path(data.path).parent.iterdir():
    (tmp_path / path.name).write_bytes(path.read_bytes())
  moved = dataclasses.replace(data, path=str(tmp_path / "*"))
  assert texts_of(moved, "valid") == valid


def test_split_does_not_change_between_versions(
  make_config, texts_of, tmp_path
):
  """Pinned: a change of the rule would mix training and validation."""
  for i in range(12):
    (tmp_path / f"{i:02}.txt").write_text(f"{i:02}")
  data = make_config(
    source="text", path=f"{tmp_path}/*", valid_fraction=0.3
  ).data
  assert texts_of(data, "valid") == ["00", "05", "06", "07", "09"]
