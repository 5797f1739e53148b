"""Invented facts: a seed decides them all, and nothing else can tell them.

  (facts,) = draw(num_facts=100, seed=0)

Names are made of syllables, and answers are drawn evenly from lists of some
fifty words, or are people of the same set. Two facts of a set may be joined to
a question that needs both: what does the owner of a company do for a living?
"""

import json
import pathlib
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from benchmarks.facts import phrases

# People are half of the entities, as places and companies name them.
KINDS = ("person", "person", "place", "company")
FACTS_OF_ENTITY = 2

# How a syllable begins, its vowel, and how it ends.
_SYLLABLE = (
  "b br d dr f g gr h j k kl l m n p pr r s sk t th tr v vl z",
  "a e i o u ae ia eo",
  " l m n r s th x nd rk lt sk",
)
_PLACES = ("mere", "holm", "wick", "stead", "fell", "moor", "garth", "combe")
_COMPANIES = ("Works", "Brothers", "Group", "Company", "Union", "House")


class Fact(NamedTuple):
  """The answer to an attribute, a key of `phrases.ATTRIBUTES`, of an entity."""

  subject: str
  attribute: str
  answer: str

  def prompts(self, is_seen: bool) -> list[str]:
    """Returns all ways to ask: those seen in training, or those never seen."""
    attribute = phrases.ATTRIBUTES[self.attribute]
    texts = [x.format(self.subject) for x in attribute.templates(is_seen)]
    return [text[0].upper() + text[1:] for text in texts]

  def prompt(self, is_seen: bool, number: int) -> str:
    """Returns one of them."""
    prompts = self.prompts(is_seen)
    return prompts[number % len(prompts)]


def draw(num_facts: int, seed: int, num_sets: int = 1) -> list[list[Fact]]:
  """Draws sets of facts about entities of which no two have the same name.

  Args:
    num_facts: of a set.
    seed: two draws with it begin with the same sets.
    num_sets: how many sets; they share no entity.
  """
  names, sets = _Names(random.Random(f"names {seed}")), []
  for number in range(num_sets):
    rng = random.Random(f"set {number} {seed}")
    count = -(-num_facts // FACTS_OF_ENTITY)
    kinds = [KINDS[i % len(KINDS)] for i in range(count)]
    entities = [(kind, names.new(kind)) for kind in kinds]
    people = [name for kind, name in entities if kind == "person"]
    answers = _Answers(rng, people)
    facts = [
      Fact(name, attribute, answers.next(attribute))
      for kind, name in entities
      for attribute in sorted(rng.sample(_attributes(kind), FACTS_OF_ENTITY))
    ]
    sets.append(facts[:num_facts])
  return sets


def _attributes(kind: str) -> list[str]:
  return [k for k, v in phrases.ATTRIBUTES.items() if v.kind == kind]


class _Names:
  """Draws names that were not drawn before."""

  def __init__(self, rng: random.Random):
    self._rng, self._taken = rng, set()

  def new(self, kind: str) -> str:
    while (name := self._name(kind)) in self._taken:
      pass
    self._taken.add(name)
    return name

  def _name(self, kind: str) -> str:
    if kind == "person":
      return f"{self._word(2)} {self._word(2)}"
    if kind == "place":
      return self._word(2) + self._rng.choice(_PLACES)
    return f"{self._word(2)} {self._rng.choice(_COMPANIES)}"

  def _word(self, syllables: int) -> str:
    letters = (
      self._rng.choice(part.split(" "))
      for _ in range(syllables)
      for part in _SYLLABLE
    )
    return "".join(letters).capitalize()


class _Answers:
  """Draws answers evenly: none again before all others were drawn."""

  def __init__(self, rng: random.Random, people: Sequence[str]):
    self._rng, self._people, self._left = rng, people, {}

  def next(self, attribute: str) -> str:
    left = self._left.setdefault(attribute, [])
    if not left:
      answers = phrases.ATTRIBUTES[attribute].answers
      left += self._people if answers == phrases.PERSON else answers.split()
      self._rng.shuffle(left)
    return left.pop()


def two_hop(facts: Sequence[Fact]) -> list[Fact]:
  """Returns the questions whose answers need two of the facts.

  Their subject is another fact in words, such as "the owner of Vlaesk Works".
  """
  of_person = {}
  for fact in facts:
    of_person.setdefault(fact.subject, []).append(fact)
  return [
    second._replace(
      subject=phrases.ATTRIBUTES[first.attribute].reference.format(
        first.subject
      )
    )
    for first in facts
    if phrases.ATTRIBUTES[first.attribute].answers == phrases.PERSON
    for second in of_person.get(first.answer, [])
  ]


def chance(facts: Sequence[Fact]) -> float:
  """Returns what guessing gets right if all answers are known, not whose.

  The best guess is the most frequent answer to the same attribute.
  """
  answers = {}
  for fact in facts:
    answers.setdefault(fact.attribute, Counter())[fact.answer] += 1
  best = sum(counts.most_common(1)[0][1] for counts in answers.values())
  return best / len(facts)


def lines(facts: Iterable[Fact], is_seen: bool = True) -> list[str]:
  """Returns each fact in each template of a split, as `data.records` has it."""
  return [
    json.dumps({"prompt": prompt, "answer": answer_text(fact)})
    for fact in facts
    for prompt in fact.prompts(is_seen)
  ]


def answer_text(fact: Fact) -> str:
  """Returns what follows a prompt."""
  return f" {fact.answer}."


def write(path: pathlib.Path, facts: Iterable[Fact]) -> None:
  """Writes the examples to train on, in seen templates."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text("\n".join(lines(facts)) + "\n")
