"""Prompts with answers: which tokens count, and what is refused."""

import datetime
import json
import pathlib

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from ultramem_jax import data
from ultramem_jax.settings.errors import ConfigError, DataError

PAD, BOS, EOS = 256, 257, 258
PAIRS = [("Q: é? A:", " 12"), ("", "no prompt"), ("two\n", "à b")]


@pytest.fixture
def settings(tmp_path):
  """The data settings of records in a file, trained and evaluated on."""

  def write(records, name="facts.jsonl", **others):
    path = tmp_path / name
    if name.endswith(".parquet"):
      parquet.write_table(pa.Table.from_pylist(records), path)
    else:
      path.write_text("".join(json.dumps(r) + "\n" for r in records))
    given = {"source": "text", "path": str(path), "valid_path": str(path)}
    return given | {"records": "answers"} | others

  return write


def pairs(prompts_and_answers):
  return [{"prompt": p, "answer": a} for p, a in prompts_and_answers]


def slow_stream(prompts_and_answers):
  """Returns (token, weight, bytes) of every token of bos, pair, eos ..."""
  stream = []
  for prompt, answer in prompts_and_answers:
    size = len(answer.encode())
    stream += [(token, 0, 0) for token in (BOS, *prompt.encode())]
    for i, token in enumerate([*answer.encode(), EOS]):
      share = (i + 1) * size // (size + 1) - i * size // (size + 1)
      stream.append((token, 1, share))
  return stream


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet"])
@pytest.mark.parametrize("seq_len", [5, 16, 300])
def test_only_answers_count_in_packed_rows(
  settings, make_config, name, seq_len
):
  config = make_config(**settings(pairs(PAIRS), name, seq_len=seq_len))
  batches = list(data.open(config).valid(range(3)))
  stream = slow_stream(PAIRS)
  for number, key in enumerate(["targets", "weights", "bytes"]):
    found = np.concatenate([batch[key].ravel() for batch in batches])
    wanted = [each[number] for each in stream[1:]]
    padding = [PAD if key == "targets" else 0] * (len(found) - len(wanted))
    assert found.tolist() == wanted + padding


def test_an_example_has_a_row_of_its_own(settings, make_config):
  given = settings(pairs(PAIRS), packing="examples", seq_len=14)
  (batch,) = data.open(make_config(**given)).valid(range(3))
  for row, pair in enumerate(PAIRS):
    stream = slow_stream([pair])
    tokens, weights, sizes = map(list, zip(*stream, strict=True))
    length = len(stream) - 1
    rest = 14 - length
    for key, wanted, padding in [
      ("tokens", tokens, PAD),
      ("targets", tokens[1:], PAD),
      ("weights", weights[1:], 0),
      ("bytes", sizes[1:], 0),
      ("segments", [1] * len(stream), 0),
      ("positions", [*range(len(stream))], 0),
    ]:
      wanted = (wanted + [padding] * (rest + 1))[:14]
      assert batch[key][row].tolist() == wanted, key


def test_training_resumes_exactly(
  settings, make_config, take, assert_equal_batches
):
  many = [(f"{i}?", "x" * (i % 5 + 1)) for i in range(11)]
  for mode in ("examples", "segments"):
    config = make_config(**settings(pairs(many), packing=mode, prefetch=0))
    corpus = data.open(config)
    batches = corpus.train(range(3))
    made, states = [], []
    for _ in range(20):
      states.append(json.dumps(batches.get_state()))
      made.append(next(batches))
    for position in (1, 4, 5, 17):
      resumed = corpus.train(range(3))
      resumed.set_state(json.loads(states[position]))
      assert_equal_batches(take(resumed, 3), made[position : position + 3])
    # Lanes together read every example once an epoch.
    answers = sum(batch["weights"].sum() for batch in made)
    assert (
      0 < answers < sum(batch["segments"].astype(bool).sum() for batch in made)
    )
  rows = np.concatenate([b["tokens"] for b in made])
  assert (rows == BOS).any()


def test_an_example_that_is_too_long(settings, make_config):
  given = settings(
    pairs([*PAIRS, ("a", "b" * 20)]), packing="examples", seq_len=14
  )
  with pytest.raises(DataError) as caught:
    data.open(make_config(**given)).describe()
  assert str(caught.value).startswith(
    f"{given['path']}, line 4: an example of 23 tokens does not fit"
  )
  with pytest.raises(DataError, match="an example of 23 tokens does not fit"):
    list(data.open(make_config(**given)).valid(range(3)))
  cut = data.open(make_config(**given | {"long_examples": "cut"}))
  # One in each split, which are the same file here.
  assert "; examples that are cut to fit into a row: 2" in cut.describe()
  batch = list(cut.valid(range(3)))[1]
  assert batch["targets"][0].tolist() == [ord("a"), *b"b" * 13]
  assert batch["weights"][0].tolist() == [0] + [1] * 13

  given = settings(pairs([("p" * 14, "b")]), packing="examples", seq_len=14)
  corpus = data.open(make_config(**given | {"long_examples": "cut"}))
  with pytest.raises(DataError, match="line 1: an example has 15 tokens befor"):
    corpus.describe()


def test_text_stands_beside_examples(settings, make_config, texts_of):
  records = [{"text": "all", "url": "x"}, *pairs([("a", "b")]), {"text": ""}]
  config = make_config(**settings(records, seq_len=20))
  assert len(texts_of(config.data, "train")) == 2
  (batch,) = data.open(config).valid(range(3))
  assert batch["weights"][0].tolist() == [1] * 4 + [0] * 2 + [1] * 2 + [0] * 12
  assert batch["bytes"].sum() == 4


@pytest.mark.parametrize(
  ("record", "message"),
  [
    ({"prompt": "a", "answer": " \n"}, "{}, line 2: the answer is empty"),
    ({"prompt": 3, "answer": "b"}, "{}, line 2: prompt is not a string"),
    ({"prompt": "a"}, "{}, line 2 must hold prompt and answer, or"),
    (
      {"prompt": "a", "answer": "b", "id": 1},
      "nothing else besides an answer; fields there: prompt, answer, id",
    ),
    (
      {"prompt": "a", "answer": "b", "messages": []},
      "fields there: prompt, answer, messages",
    ),
    ({"text": "a", "answer": "b"}, "{}, line 2 must hold prompt and"),
    ({"body": "a"}, "fields there: body, and neither prompt nor messages"),
    ({"messages": []}, "{}, line 2: messages must be a list of objects"),
    (
      {"messages": [{"role": "user", "content": "a", "name": "b"}]},
      "{}, line 2: messages must be a list of objects that hold role and",
    ),
    (
      {"messages": [{"role": "user", "content": "a"}]},
      "{}, line 2: no message is the assistant's",
    ),
    (
      {"messages": [{"role": "assistant", "content": "a"}]},
      "{}, line 2: the first message is the assistant's",
    ),
    (
      {
        "messages": [
          {"role": "user", "content": "a"},
          {"role": "assistant", "content": "b"},
        ]
      },
      "data.tokenizer = 'bytes': has no chat template",
    ),
  ],
)
def test_bad_records_are_named(settings, assert_refused, record, message):
  given = settings([*pairs([("a", "b")]), record])
  assert_refused(message.format(given["path"]), **given)


def test_bad_rows_are_named(settings, assert_refused):
  given = settings(pairs([("a", "b"), ("a", "")]), "a.parquet")
  assert_refused(f"{given['path']}, row 2: the answer is empty", **given)
  given = settings(pairs([("a", "b"), (None, "b")]), "b.parquet")
  assert_refused("b.parquet, row 2", **given)
  given = settings(pairs([(b"a", "b")]), "bytes.parquet")
  assert_refused("bytes.parquet, row 1: prompt is not a string", **given)
  day = datetime.date(2000, 1, 1)
  given = settings(pairs([("a", day)]), "day.parquet")
  assert_refused("day.parquet, row 1: answer is not a string", **given)
  given = settings(pairs([("a", "b")]), "latin.parquet")
  latin = pa.array([b"\xe9"]).view(pa.string())
  table = pa.table({"prompt": latin, "answer": ["b"]})
  parquet.write_table(table, given["path"])
  assert_refused("latin.parquet: holds text that is not UTF-8", **given)
  given = settings([{"prompt": "a", "answer": "b", "n": 1}], "c.parquet")
  assert_refused("fields there: prompt, answer, n", **given)


def test_settings_that_cannot_work_are_refused(make_config):
  for changes, message in [
    ({"records": "answers"}, "data.records = 'answers': needs data.source"),
    (
      {"source": "tfds", "tfds_name": "a", "packing": "examples"},
      "data.packing = 'examples': needs data.source",
    ),
    (
      {
        "source": "text",
        "path": "a",
        "records": "answers",
        "text_field": "answer",
      },
      "data.text_field = 'answer': must be none of",
    ),
  ]:
    with pytest.raises(ConfigError, match=message):
      make_config(**changes)


def test_a_record_that_changes_is_told(settings, make_config):
  given = settings(pairs([("ab", "c"), ("ab", "c")]), prefetch=0)
  batches = data.open(make_config(**given)).train(range(3))
  path = pathlib.Path(given["path"])
  path.write_text(
    path.read_text().replace('"ab"', '"a"').replace('"c"', '"bc"')
  )
  with pytest.raises(DataError, match="changed while in use"):
    next(batches)
