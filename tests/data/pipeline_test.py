"""Batches: what they hold, and resuming at any of them."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ultramem_jax import data

BOS, EOS = 257, 258


def test_validation_covers_every_byte_once(
  corpora, kind, texts, make_config, assert_equal_batches
):
  config = make_config(**corpora[kind])
  valid = data.open(config).valid(range(3))
  batches = list(valid)
  if "record" in kind:
    texts = [t.upper() for t in texts]
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


def test_eval_batches_limits_validation(
  corpora, make_config, take, assert_equal_batches
):
  config = make_config(eval_batches=2, **corpora["jsonl"])
  everything = make_config(**corpora["jsonl"])
  assert_equal_batches(
    list(data.open(config).valid(range(3))),
    take(data.open(everything).valid(range(3)), 2),
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


def test_an_epoch_holds_each_document_once(
  corpora, kind, texts, make_config, take
):
  config = make_config(batch_size=1, **corpora[kind])
  batches = take(data.open(config).train(range(1)), 400)
  found = documents_in(train_stream(batches, 0))
  wanted = sorted(t.encode() for t in texts if t)
  epochs = [
    found[i : i + len(wanted)] for i in range(0, len(found), len(wanted))
  ][:-1]
  assert len(epochs) >= 2
  for epoch in epochs:
    assert sorted(epoch) == wanted
  assert len({tuple(x) for x in (*epochs[:2], wanted)}) == 3


@pytest.mark.parametrize("prefetch", [0, 2])
def test_resume_is_exact_at_every_position(
  corpora, kind, prefetch, make_config, take, assert_equal_batches
):
  """Through JSON, in a fresh iterator, at 60 positions."""
  config = make_config(prefetch=prefetch, **corpora[kind])
  corpus = data.open(config)
  batches = corpus.train(range(3))
  made, states = [], []
  for _ in range(60):
    states.append(json.dumps(batches.get_state()))
    made.append(next(batches))
  batches.close()
  tokens = np.concatenate([b["tokens"] for b in made], axis=1)
  assert (tokens[:, ::16] == BOS).any() and (tokens[:, ::16] == EOS).any()

  resumed = corpus.train(range(3))
  for position, state in enumerate(states):
    resumed.set_state(json.loads(state))
    assert resumed.get_state() == json.loads(state)
    count = min(3, 60 - position)
    assert_equal_batches(
      take(resumed, count), made[position : position + count]
    )
  resumed.close()


@pytest.mark.parametrize("kind", ["files", "tfrecord"])
def test_batches_do_not_depend_on_processes(
  corpora, kind, make_config, take, assert_equal_batches
):
  """Two processes make the halves of one process's batch, and hand over."""
  config = make_config(batch_size=6, **corpora[kind])
  corpus = data.open(config)
  one = corpus.train(range(6))
  two = [corpus.train(range(0, 2)), corpus.train(range(2, 6))]

  def joined(parts):
    return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

  assert_equal_batches(
    take(one, 20), [joined([next(t) for t in two]) for _ in range(20)]
  )
  state = two[0].get_state() | two[1].get_state()
  assert state == one.get_state()
  three = [corpus.train(range(i, i + 2)) for i in (0, 2, 4)]
  for part in three:
    part.set_state(json.loads(json.dumps(state)))
  assert_equal_batches(
    take(one, 5), [joined([next(t) for t in three]) for _ in range(5)]
  )
  valid = list(corpus.valid(range(6)))
  halves = [corpus.valid(r) for r in (range(2), range(2, 6))]
  assert_equal_batches(valid, [joined(p) for p in zip(*halves, strict=True)])


def test_state_without_a_lane_is_refused(corpora, make_config):
  batches = data.open(make_config(**corpora["files"])).train(range(3))
  state = batches.get_state()
  del state["1"]
  with pytest.raises(ValueError, match=r"lacks 1 lanes, such as 1"):
    batches.set_state(state)


@pytest.mark.parametrize("kind", ["files", "tfrecord"])
def test_order_depends_only_on_the_seed(
  corpora, kind, make_config, take, assert_equal_batches
):
  def first(seed):
    config = make_config(seed=seed, **corpora[kind])
    return take(data.open(config).train(range(3)), 9)

  assert_equal_batches(first(5), first(5))
  assert_equal_batches(first(2**32 - 1), first(2**32 - 1))
  assert any(
    (a["tokens"] != b["tokens"]).any()
    for a, b in zip(first(5), first(6), strict=True)
  )


def test_more_lanes_than_documents(corpora, kind, make_config, take):
  config = make_config(batch_size=100, **corpora[kind])
  batches = take(data.open(config).train(range(100)), 4)
  assert all((b["segments"] > 0).all() for b in batches)


def test_error_in_the_thread_reaches_the_caller_and_repeats(
  tmp_path, make_config, take
):
  """A file that vanishes raises at its batch, again when retried."""
  for i in range(3):
    (tmp_path / f"{i}.txt").write_text("word " * 20)
  pattern = str(tmp_path / "*.txt")
  config = make_config(source="text", path=pattern, valid_path=pattern)
  batches = data.open(config).train(range(3))
  for i in range(3):
    (tmp_path / f"{i}.txt").write_text("")
  for _ in range(2):
    with pytest.raises(ValueError, match=r"was cut short while in use"):
      take(batches, 30)
  batches.close()


def test_an_iterator_left_open_exits_in_silence():
  code = (
    "from configs import tiny; from ultramem_jax import data; "
    "from ultramem_jax.settings.config import parse; "
    "next(data.open(parse(tiny.get_config())).train(range(8)))"
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
