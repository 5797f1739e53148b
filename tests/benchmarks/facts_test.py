"""The invented facts: none twice, none to be guessed, templates apart."""

import itertools
import json
import random
import re
from collections import Counter

import jax
import numpy as np
import pytest

from benchmarks.facts import capacity, general, methods, phrases, recall
from benchmarks.facts import facts as facts_lib
from benchmarks.facts.facts import draw
from benchmarks.facts.memory import THREE_PLACES, Memory
from benchmarks.facts.store import Cell
from configs import default
from tests.examples.word_model import make_folder
from ultramem_jax import data
from ultramem_jax.data import sources
from ultramem_jax.serve import generate
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.config import parse
from ultramem_jax.settings.sampling import Sampling
from ultramem_jax.tools import accounting, pretrained


@pytest.fixture(scope="module")
def facts():
  (facts,) = draw(1000, seed=0)
  return facts


def test_a_seed_decides_all(facts):
  assert draw(1000, seed=0) == [facts]
  assert draw(1000, seed=1) != [facts]
  # More sets begin with the same ones.
  assert draw(50, 0, num_sets=3)[:2] == draw(50, 0, num_sets=2)


@pytest.mark.parametrize("size", [1, 7, 100, 20_000])
def test_sizes_and_distinct_facts(size):
  (facts,) = draw(size, seed=3)
  asked = {(fact.subject, fact.attribute) for fact in facts}
  assert len(facts) == len(asked) == size


def test_sets_share_no_entity():
  sets = draw(40, 0, num_sets=5)
  subjects = [{fact.subject for fact in one} for one in sets]
  for one, other in itertools.combinations(subjects, 2):
    assert not one & other
  for one in sets:  # answers that are people are of the same set
    people = {f.subject for f in one if kind(f) == "person"}
    answers = {f.answer for f in one if answered_by_people(f)}
    assert answers and answers <= people


def kind(fact):
  return phrases.ATTRIBUTES[fact.attribute].kind


def answered_by_people(fact):
  return phrases.ATTRIBUTES[fact.attribute].answers == phrases.PERSON


def test_no_template_is_both_seen_and_not():
  for attribute in phrases.ATTRIBUTES.values():
    seen, unseen = map(attribute.templates, (True, False))
    assert len(set(seen)) == len(seen) == 13
    assert len(set(unseen)) == len(unseen) == 5
    assert not set(seen) & set(unseen)
    # Nor are the phrases inside the frames.
    for one, other in zip(attribute.seen, attribute.unseen, strict=True):
      for phrase, never in itertools.product(one, other):
        assert never not in phrase and phrase not in never
    assert all(template.count("{}") == 1 for template in seen + unseen)
  seen, unseen = phrases.SEEN_FRAMES, phrases.UNSEEN_FRAMES
  assert not set(sum(seen, ())) & set(sum(unseen, ()))


def test_what_is_written_holds_no_unseen_prompt(facts, tmp_path):
  facts_lib.write(tmp_path / "facts.jsonl", facts)
  lines = (tmp_path / "facts.jsonl").read_text().splitlines()
  examples = [json.loads(line) for line in lines]
  prompts = {example["prompt"] for example in examples}
  assert len(examples) == 13 * len(facts)
  assert not prompts & {p for f in facts for p in f.prompts(is_seen=False)}
  assert {p for f in facts for p in f.prompts(is_seen=True)} == prompts
  assert all(re.fullmatch(r" [\w ]+\.", x["answer"]) for x in examples)


def test_answers_keep_the_space_before_them(tmp_path):
  """A tokenizer of words decodes none before the first word."""
  (tmp_path / "model").mkdir()
  make_folder(tmp_path / "model")
  settings = parse(default.get_config())
  pretrained.import_run(tmp_path / "model", tmp_path / "run", settings)
  loaded = load_lib.load(tmp_path / "run")
  random = np.random.default_rng(3)  # with which it says something
  loaded = loaded._replace(
    variables=jax.tree.map(
      lambda x: x + random.normal(0, 0.3, x.shape).astype(x.dtype),
      loaded.variables,
    )
  )
  tokenizer = data.open(loaded.config).tokenizer
  prompts = ["The capital of Zubrovia is", "The first queen"]
  told = recall.answers(loaded, tokenizer, prompts, 4)
  assert told == generate.generate_text(
    loaded.model, loaded.variables, tokenizer, prompts, Sampling(4, 0.0), 0
  )
  assert any(text.startswith(" ") for text in told)


def test_names_tell_nothing_of_answers(facts):
  """Neither is an answer part of its subject, nor is one much more likely."""
  for fact in facts:
    assert fact.answer.lower() not in fact.subject.lower()
  assert facts_lib.chance(facts) < 0.03
  (few,) = draw(100, seed=0)
  assert facts_lib.chance(few) < 0.1


def test_chance_is_what_the_best_constant_guess_gets():
  made = [
    facts_lib.Fact(f"P{i}", "town", town)
    for i, town in enumerate(["Oslo", "Oslo", "Rome", "Cairo"])
  ]
  assert facts_lib.chance(made) == 0.5
  assert facts_lib.chance([*made, facts_lib.Fact("P", "job", "baker")]) == 0.6


def test_questions_that_need_two_facts():
  owner = facts_lib.Fact("Vlaesk Works", "owner", "Ada Brun")
  job = facts_lib.Fact("Ada Brun", "job", "baker")
  other = facts_lib.Fact("Ida Kol", "job", "pilot")
  (question,) = facts_lib.two_hop([owner, other, job])
  assert question.prompts(is_seen=True)[0] == (
    "The owner of Vlaesk Works works as a"
  )
  assert question.answer == "baker"


def test_two_hop_questions_are_not_trained_on(facts):
  questions = facts_lib.two_hop(facts)
  assert len(questions) > 100
  trained = set(facts_lib.lines(facts))
  assert not trained & set(facts_lib.lines(questions))


def test_held_out_topics_share_no_paragraph_with_the_rest():
  def paragraphs(texts):
    return {x.strip() for text in texts for x in text.split("\n\n")} - {""}

  train, held_out = (paragraphs(general.english(x)) for x in (False, True))
  assert len(train) > 1000 and len(held_out) > 100
  assert not train & held_out


def test_source_code_to_train_on_has_no_topics():
  every = sources.Splits(parse(default.get_config()).data).train.documents()
  (held_out,) = (x for x in every if "topics = {'assert'" in x)
  kept = general.python()
  assert len(kept) > 500 and held_out not in kept


def test_pieces_are_of_their_texts_and_short():
  texts = ["one\ntwo three\n" * 40, "  indented\n" * 3]
  pieces = general.pieces(texts, 20, random.Random(0))
  assert len(pieces) == 20 and len(set(pieces)) > 1
  for piece in pieces:
    assert 0 < len(piece) <= general.PIECE
    assert any(piece in text for text in texts)


@pytest.mark.parametrize("count", [250, 400, 800, 1600])
def test_of_many_facts_a_fair_sample_is_asked_for(count):
  (facts,) = draw(count, seed=0)
  asked = recall.sample(facts)
  assert len(asked) == len({*asked}) == recall.MOST and {*asked} <= {*facts}
  assert asked == recall.sample(facts)
  # Every attribute is asked for about as often as it is taught.
  taught, told = (Counter(x.attribute for x in part) for part in (facts, asked))
  for attribute, times in taught.items():
    assert abs(told[attribute] / recall.MOST - times / count) < 0.06


def capacity_records(recalls):
  """Returns records of the cells that have a recall, by facts and rows."""
  first = Cell("small", "capacity", "values_3", 1.0, 0, 800, 100)
  return [
    {**cell._asdict(), "recall": {"all": {"seen": recalls[place]}}}
    for cell in capacity.cells(first)
    if (place := (cell.facts, cell.rows)) in recalls
  ]


def test_a_table_stores_the_largest_set_that_is_recalled():
  records = capacity_records(
    {(100, 16_384): 0.95, (200, 16_384): 0.9, (400, 16_384): 0.89}
    | {(100, 65_536): 0.2}
  )
  by_rows = {
    next(iter(group.values()))["rows"]: capacity.stored(group)
    for group in capacity.groups(records).values()
  }
  assert by_rows == {16_384: 200, 65_536: 0}
  full = [capacity.is_full(x) for x in capacity.groups(records).values()]
  assert full == [True, True]
  (open_table,) = capacity.groups(
    capacity_records({(100, 16_384): 0.9})
  ).values()
  assert capacity.stored(open_table) == 100 and not capacity.is_full(open_table)


def test_sets_larger_than_one_that_is_not_stored_are_left_out():
  first = Cell("small", "capacity", "values_3", 1.0, 0, 800, 100)
  cells = capacity.cells(first)
  records = capacity_records({(100, 16_384): 0.95, (100, 65_536): 0.5})
  beyond = {(x.facts, x.rows) for x in cells if capacity.is_beyond(x, records)}
  assert beyond == {(x, 65_536) for x in capacity.LOADS[1:]}
  # As many steps for each fact as the smallest set has.
  assert {cell.steps / cell.facts for cell in cells} == {8.0}
  longer = first._replace(steps=1600, facts=200, rows=65_536)
  assert capacity.is_beyond(longer, records)
  # Of another seed, or with more steps for each fact, it might be.
  assert not capacity.is_beyond(longer._replace(seed=1), records)
  assert not capacity.is_beyond(longer._replace(steps=3200), records)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_a_dense_addition_does_the_work_of_the_memory(activation):
  def model_of(overrides):
    c = default.get_config()
    c.model.activation = activation
    c.update_from_flattened_dict(overrides)
    return parse(c).model

  memory = Memory(places=THREE_PLACES)
  c = default.get_config()
  overrides = memory.overrides(c.model.num_layers, c.model.embed_dim)
  with_memory = model_of(overrides)
  with_adapters = model_of(methods.dense(with_memory))
  flops, expected = (
    sum(accounting.flops_per_token(model).values())
    for model in (with_adapters, with_memory)
  )
  # The width of an MLP is a whole number.
  assert flops == pytest.approx(expected, rel=1e-3)
  assert with_adapters.adapter_layers == tuple(
    span.start for span in with_memory.spans
  )
