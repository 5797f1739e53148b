"""Packing: documents into rows of tokens, against a slow reference."""

import numpy as np
import pytest

from ultramem_jax import data
from ultramem_jax.data import encoding, packing

PAD, BOS, EOS = 256, 257, 258


def slow_rows(texts, seq_len, mode):
  """Packs a finite corpus one token at a time."""
  stream = []  # (token, weight, bytes, document, place in it)
  for number, text in enumerate(filter(None, texts)):
    encoded = text.encode()
    n = len(encoded) + 1
    stream.append((BOS, 0, 0, number))
    for i, token in enumerate([*encoded, EOS]):
      size = (i + 1) * len(encoded) // n - i * len(encoded) // n
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
      inside = i < len(stream)
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
def test_validation_packs_as_the_slow_reference(
  corpora, texts, make_config, mode, seq_len
):
  config = make_config(packing=mode, **corpora["jsonl"] | {"seq_len": seq_len})
  rows = slow_rows(texts, seq_len, mode)
  batches = list(data.open(config).valid(range(3)))
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


def test_bytes_are_exact_with_tokens_of_many_bytes():
  """A long text of few tokens: no overflow, every byte given away."""
  document = encoding.Encoded(
    np.zeros(1001, np.int32), ((1, 1001),), 2**40 + 12345
  )
  whole = packing.byte_counts(packing.Piece(document, 0, 1001))
  assert whole[0] == 0 and whole.sum() == 2**40 + 12345
  parts = [packing.Piece(document, 0, 7), packing.Piece(document, 7, 1001)]
  np.testing.assert_array_equal(
    np.concatenate([packing.byte_counts(p) for p in parts]), whole
  )


@pytest.mark.parametrize("mode", ["segments", "concat"])
def test_training_rows_are_marked_like_validation_rows(
  corpora, make_config, take, mode
):
  """Weights, segments and positions follow from where bos stands."""
  config = make_config(packing=mode, **corpora["files"])
  for batch in take(data.open(config).train(range(3)), 60):
    assert "bytes" not in batch
    begins_BT = batch["tokens"] == BOS
    begins_BT[:, 0] = True
    np.testing.assert_array_equal(
      batch["weights"], (batch["targets"] != BOS).astype(np.float32)
    )
    np.testing.assert_array_equal(
      batch["tokens"][:, 1:], batch["targets"][:, :-1]
    )
    segment_BT = np.cumsum(begins_BT, axis=1)
    start_BT = np.maximum.accumulate(np.arange(16) * begins_BT, axis=1)
    position_BT = np.arange(16) - start_BT
    if mode == "concat":
      segment_BT, position_BT[:] = np.ones_like(segment_BT), np.arange(16)
    np.testing.assert_array_equal(batch["segments"], segment_BT)
    np.testing.assert_array_equal(batch["positions"], position_BT)
