"""Mixtures: shares of documents, exact resume, and what is told of them."""

import itertools
import json

import pytest

from ultramem_jax import data
from ultramem_jax.data.sources import Splits
from ultramem_jax.settings.errors import ConfigError

FACTS = [f"fact {i}" for i in range(120)]


@pytest.fixture
def mixed(corpora, make_config, tmp_path):
  """Returns the config of a kind of source and two other files."""
  lines = [json.dumps({"text": fact}) for fact in FACTS]
  (tmp_path / "facts.jsonl").write_text("\n".join(lines))
  (tmp_path / "book.txt").write_text("A book\n" * 3)

  def mixed(kind="files", facts=0.3, **others):
    shares = f"{tmp_path}/facts.jsonl={facts},{tmp_path}/*.txt=0.125"
    return make_config(**corpora[kind] | {"mixture": shares} | others)

  return mixed


def source_of(document):
  if document in FACTS:
    return "facts"
  return "book" if document.startswith("A book") else "main"


@pytest.mark.parametrize("facts", [0.3, 0.001, 0.85])
def test_each_lane_has_the_shares(mixed, facts):
  """Of its first documents, up to a few; lanes differ in their order."""
  source = Splits(mixed(facts=facts).data).train
  orders = []
  for lane in source.lanes(range(3), 3, seed=5):
    drawn = [source_of(next(lane)) for _ in range(240)]
    orders.append(drawn)
    for count in (8, 80, 240):
      for name, share in [("facts", facts), ("book", 0.125)]:
        assert abs(drawn[:count].count(name) - share * count) < 3
  assert len({tuple(order) for order in orders}) == 3
  # Another seed begins elsewhere.
  lane = source.lanes([0], 3, seed=6)[0]
  assert [source_of(next(lane)) for _ in range(240)] != orders[0]


def test_each_document_of_a_source_is_read_once_an_epoch(mixed):
  (lane,) = Splits(mixed(facts=0.5).data).train.lanes([0], 1, seed=0)
  facts = [d for d in itertools.islice(lane, 500) if d in FACTS]
  epochs = facts[:120], facts[120:240]
  assert all(sorted(epoch) == sorted(FACTS) for epoch in epochs)
  assert len({tuple(x) for x in (*epochs, FACTS)}) == 3


@pytest.mark.parametrize("kind", ["files", "tfrecord"])
def test_resume_is_exact(mixed, kind, take, assert_equal_batches):
  corpus = data.open(mixed(kind, prefetch=2))
  batches = corpus.train(range(3))
  made, states = [], []
  for _ in range(30):
    states.append(json.dumps(batches.get_state()))
    made.append(next(batches))
  batches.close()
  for position in (0, 1, 7, 8, 20, 27):
    resumed = corpus.train(range(3))
    resumed.set_state(json.loads(states[position]))
    assert_equal_batches(take(resumed, 3), made[position : position + 3])
    resumed.close()


def test_rows_do_not_depend_on_processes(mixed, take):
  corpus = data.open(mixed(prefetch=0))
  one, two = (take(corpus.train(rows), 9) for rows in (range(3), [2]))
  for whole, part in zip(one, two, strict=True):
    assert (whole["tokens"][2] == part["tokens"][0]).all()


def test_a_mixture_is_described_and_bound_to(mixed, tmp_path):
  config = mixed()
  (tmp_path / "book.txt").write_bytes(b"A book \xff\n" * 3)
  corpus = data.open(config)
  described = corpus.describe()
  path = f"{tmp_path}/facts.jsonl"
  assert (
    f"; 0.3 of the documents to train on come from the 120 of {path}; "
    in (described)
  )
  assert described.endswith("; bytes that are not UTF-8: 3")
  before = corpus.inputs("train")["data.mixture"]
  assert list(before) == [f"{path}: facts.jsonl", f"{tmp_path}/*.txt: book.txt"]
  assert "data.mixture" not in corpus.inputs("valid")
  (tmp_path / "book.txt").write_bytes(b"A Book \xff\n" * 3)
  after = data.open(config).inputs("train")["data.mixture"]
  changed = [name for name in before if before[name] != after[name]]
  assert changed == [f"{tmp_path}/*.txt: book.txt"]


def test_validation_documents_in_a_mixture_are_counted(mixed, tmp_path):
  config = mixed(source="text", valid_path=f"{tmp_path}/facts.jsonl")
  assert "; validation documents that are in train, too: 120; " in (
    data.open(config).describe()
  )


def test_facts_that_are_too_long_are_named(mixed, tmp_path):
  config = mixed(packing="examples", seq_len=600)
  assert data.open(config).describe()
  (tmp_path / "facts.jsonl").write_text(json.dumps({"text": "a" * 600}))
  with pytest.raises(ValueError, match=r"facts.jsonl, line 1: an example of"):
    data.open(config).describe()


@pytest.mark.parametrize(
  ("mixture", "message"),
  [
    ("facts.jsonl", "must be PATH=SHARE, joined by ','"),
    ("a=0.1,=0.1", "must be PATH=SHARE, joined by ','"),
    ("a=0.1.2", "'0.1.2' must be a number"),
    ("a=0.5,b=0.5", "must have shares above 0 that add up to less than 1"),
    ("a=0", "must have shares above 0"),
    ("a=0.1,a=0.2", "must name each path once"),
  ],
)
def test_shares_that_cannot_be_are_refused(make_config, mixture, message):
  with pytest.raises(ConfigError) as caught:
    make_config(mixture=mixture)
  assert str(caught.value).startswith(f"data.mixture = {mixture!r}: ")
  assert message in str(caught.value)


def test_files_of_a_mixture_are_named(assert_refused, tmp_path):
  assert_refused("data.mixture = 'nowhere': matches no", mixture="nowhere=0.1")
  path = tmp_path / "empty.txt"
  path.write_text("")
  assert_refused(
    f"data.mixture = '{path}': holds no text", mixture=f"{path}=0.1"
  )
