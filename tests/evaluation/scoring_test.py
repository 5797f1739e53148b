"""Scores of texts and their continuations, against the slow ones."""

import re

import jax
import numpy as np
import pytest

from ultramem_jax.data import tokenizer as tokenizer_lib
from ultramem_jax.evaluation import scoring
from ultramem_jax.serve import generate
from ultramem_jax.settings.sampling import Sampling

GREEDY = Sampling(20, temperature=0.0)


@pytest.fixture(scope="module")
def scorer(slow):
  return scoring.Scorer(slow.run)


class Merging:
  """Letters as tokens, and "ab" as one."""

  bos_id = 9

  def encode(self, text):
    ids = {"a": 1, "b": 2, "ab": 3, " ": 4}
    return np.array([ids[t] for t in re.findall("ab|.", text)], np.int32)


@pytest.mark.parametrize(
  "context, continuation, expected",
  [
    ("aa", "b", ([9, 1, 1], [2])),  # "a" and "ab" would be the whole
    ("aab", " b", ([9, 1, 3], [4, 2])),
    # White space begins the continuation.
    ("aab", "b", ([9, 1, 3], [2])),
    ("aab  ", "b", ([9, 1, 3], [4, 4, 2])),
    ("", "ab", ([9], [3])),
    (" ", "ab", ([9], [4, 3])),
    ("ab", "", ([9, 3], [])),
    ("", "", ([9], [])),
  ],
)
def test_pairs_are_encoded_whole(context, continuation, expected):
  pair = scoring.encode_pair(Merging(), context, continuation)
  assert tuple(map(list, pair)) == expected
  assert all(part_T.dtype == np.int32 for part_T in pair)


def test_a_pair_is_cut_where_the_context_ends_by_itself():
  # Encoded alone the context has two tokens, so one of three is left.
  assert [list(p) for p in scoring.encode_pair(Merging(), "aa", "bb")] == [
    [9, 1, 1],
    [2],
  ]


def test_windows_by_hand():
  def windows(context, continuation, length):
    return [
      (list(window.tokens_T), window.scored)
      for window in scoring.windows(context, continuation, length)
    ]

  # The example of lm-evaluation-harness: 10 tokens, 4 at a time.
  assert windows([99], list(range(10)), 4) == [
    ([99, 0, 1, 2, 3], 4),
    ([3, 4, 5, 6, 7], 4),
    ([5, 6, 7, 8, 9], 2),
  ]
  assert windows([99, 1, 2], [3, 4], 4) == [([99, 1, 2, 3, 4], 2)]
  # One more: the first is left out.
  assert windows([99, 1, 2, 3], [4, 5], 4) == [([1, 2, 3, 4, 5], 2)]
  assert windows([99], [1], 4) == [([99, 1], 1)]
  assert windows([99, 1, 2, 3, 4, 5], [], 4) == []


def test_batches_hold_every_sequence_once_in_few_shapes():
  rng = np.random.default_rng(0)
  lengths = [int(n) for n in rng.integers(1, 301, 200)]
  found = list(scoring.batches(lengths, 300, 4))
  assert sorted(i for indices, *_ in found for i in indices) == list(range(200))
  for indices, width, rows in found:
    longest = max(lengths[i] for i in indices)
    assert longest <= width <= max(32, 2 * longest)
    assert len(indices) <= rows and rows % 4 == 0
    assert rows * width <= 4 * 300
  shapes = [shape for _, *shape in found]
  assert shapes == sorted(shapes, key=lambda shape: -shape[0])
  assert {width for width, _ in shapes} == {32, 64, 128, 256, 300}
  assert len(set(map(tuple, shapes))) == 5
  # A few short ones are not a reason for a large batch.
  assert list(scoring.batches([3, 5, 4], 300, 2)) == [([1, 2, 0], 32, 4)]
  assert list(scoring.batches([8], 8, 2)) == [([0], 8, 2)]
  assert list(scoring.batches([], 8, 2)) == []


def test_likelihoods_equal_slow_ones(scorer, slow):
  rng = np.random.default_rng(1)
  texts = ["".join(map(chr, rng.integers(97, 123, n))) for n in range(60)]
  pairs = [
    (texts[3], texts[1]),
    ("", texts[2]),
    (texts[10], "é" + texts[7]),
    (texts[31], texts[8]),
    (texts[32], texts[8]),
    (texts[33], texts[8]),
    (texts[59], texts[1]),
    (texts[59], texts[40]),
    ("", texts[40]),
  ]
  actual = scorer.log_likelihoods(pairs)
  expected = [slow.score_pair(*pair) for pair in pairs]
  np.testing.assert_allclose(*np.array([actual, expected])[..., 0], rtol=1e-5)
  assert [greedy for _, greedy in actual] == [g for _, g in expected]
  assert scorer.log_likelihoods([(texts[5], "")]) == [(0.0, True)]


def test_a_long_document_is_scored_in_windows(scorer, slow):
  text = "".join(map(chr, np.random.default_rng(2).integers(32, 127, 100)))
  tokens = [slow.bos, *text.encode()]
  expected = sum(
    slow.score(tokens[begin:end], scored)[0]
    for begin, end, scored in ((0, 41, 40), (40, 81, 40), (60, 101, 20))
  )
  ((actual, greedy),) = scorer.log_likelihoods([("", text)])
  assert actual == pytest.approx(expected, rel=1e-5)
  assert not greedy


def test_what_does_not_fit_is_counted(slow, monkeypatch):
  scorer = scoring.Scorer(slow.run)
  scores = lambda windows: [(0.0, True)] * len(windows)
  monkeypatch.setattr(scorer, "score_windows", scores)
  fits, long = "a" * (slow.length - 2), "a" * slow.length
  scorer.log_likelihoods([(fits, "bc"), ("", "b" * 3 * slow.length)])
  assert (scorer.cut_contexts, scorer.shortened) == (0, 0)
  scorer.log_likelihoods([(long, "bc"), (fits, "b"), (long, "")])
  assert scorer.cut_contexts == 1
  new = lambda model, variables, prompts, *_, **__: (
    [np.array([98])] * len(prompts)
  )
  monkeypatch.setattr(generate, "generate", new)
  half = Sampling(slow.length // 2, temperature=0.0)
  scorer.continuations(["b", "a" * (slow.length // 2 - 1)], [], half)
  assert (scorer.cut_contexts, scorer.shortened) == (1, 0)
  more = Sampling(slow.length // 2 + 1, temperature=0.0)
  scorer.continuations(["b", long], [], more)
  assert (scorer.cut_contexts, scorer.shortened) == (2, 2)


def test_greedy_is_what_generation_writes(scorer, slow):
  run = slow.run
  prompt = np.array([257, 98, 97], np.int32)
  (new_T,) = generate.generate(
    run.model,
    run.variables,
    [prompt],
    Sampling(6, temperature=0.0),
    jax.random.key(0),
  )
  tokens_T = np.append(prompt, new_T)
  cases = [scoring.Window(tokens_T, 6), scoring.Window(tokens_T, 7)]
  for place in (-1, -3, -6):  # a token that another would have been
    other_T = tokens_T.copy()
    other_T[place] = (other_T[place] + 1) % 256
    cases.append(scoring.Window(other_T, 6))
  assert [greedy for _, greedy in scorer.score_windows(cases)] == [
    True,
    False,
    False,
    False,
    False,
  ]


@pytest.mark.parametrize(
  "text, stops, expected",
  [
    ("one\ntwo. three", ["."], "one\ntwo"),
    ("one\ntwo. three", [".", "\n"], "one"),
    ("one", ["two", ""], "one"),
    ("one", [], "one"),
    ("one", ["one"], ""),
    ("a|b", ["|"], "a"),
  ],
)
def test_text_before_a_stop(text, stops, expected):
  assert scoring.before_stop(text, stops) == expected


def test_continuations_equal_slow_ones(scorer, slow, monkeypatch):
  # Asked after each of several parts.
  monkeypatch.setattr(generate, "CHECK_EVERY", 6)
  contexts = ["ab c ", "", "x" * 19, "y" * 50]
  whole = [slow.continue_text(text, 20, None) for text in contexts]
  assert scorer.continuations(contexts, [], GREEDY) == whole
  stop = next(c for c in whole[0][4:] if " " < c < "\x7f")
  stopped = [slow.continue_text(text, 20, stop) for text in contexts]
  assert stopped != whole
  assert scorer.continuations(contexts, ["never", stop], GREEDY) == stopped


def test_continuations_end_with_the_document(scorer, slow, monkeypatch):
  """eos is where it ends; half of the model's length is left to the text."""
  given = []

  def fake(model, variables, prompts, sampling, key, *, eos_id, **options):
    given.extend(map(len, prompts))
    assert eos_id == tokenizer_lib.ByteTokenizer.eos_id
    assert sampling == Sampling(slow.length // 2, temperature=0.0)
    return [np.array([104, 105], np.int32) for _ in prompts]

  monkeypatch.setattr(generate, "generate", fake)
  sampling = Sampling(1000, temperature=0.0)
  assert scorer.continuations(["a" * 90, "b"], ["."], sampling) == ["hi", "hi"]
  assert set(given) == {20, 2}
