"""TFRecord files: lanes that share them, and shuffling within windows."""

import pytest

from ultramem_jax.data.sources import Splits


@pytest.mark.parametrize("num_lanes", [1, 3, 4, 8, 11])
def test_lanes_of_record_files_share_an_epoch(
  corpora, texts, make_config, num_lanes
):
  """With fewer, as many and more lanes than the four files."""
  source = Splits(make_config(**corpora["tfrecord"]).data).train
  num_parts = 4 * -(-num_lanes // 4)  # files, cut if lanes outnumber them
  found = []
  for lane in source.lanes(range(num_lanes), num_lanes, seed=2):
    text = next(lane)
    while lane.get_state()["part"] < num_parts:
      found.append(text)
      text = next(lane)
  assert sorted(found) == sorted(texts)


def test_records_are_shuffled_within_windows_by_seed(corpora, make_config):
  settings = corpora["tfrecord"] | {"train_split": "train[:10]"}
  source = Splits(make_config(shuffle_window=5, **settings).data).train
  in_order = list(source.documents())
  orders = []
  for seed in range(3):
    (lane,) = source.lanes(range(1), 1, seed)
    orders.append([next(lane) for _ in range(20)])
    for half in (slice(5), slice(5, 10)):
      assert sorted(orders[-1][half]) == sorted(in_order[half])
    assert orders[-1][:10] != orders[-1][10:]
  assert len({tuple(order) for order in orders}) == 3
