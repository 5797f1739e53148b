"""Recall: the share of questions that a model answers exactly, greedily."""

import random
from collections.abc import Sequence

import jax

from benchmarks.facts import facts as facts_lib
from benchmarks.facts.facts import Fact
from ultramem_jax.data.tokenizer import Tokenizer, encode_prompt, new_text
from ultramem_jax.serve import generate
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.settings.sampling import Sampling

BATCH = 50  # questions that are answered together
# Questions about a set, at most, in each split: of larger sets a fair sample.
MOST = 200


def recall(
  loaded: TrainedModel, tokenizer: Tokenizer, facts: Sequence[Fact]
) -> dict[str, float]:
  """Returns the recall of a set of facts.

  Each fact is asked once in a template that was seen in training and once in
  one that never was; all templates take turns. Questions that need two facts
  are asked in seen templates.

  Args:
    loaded: the model.
    tokenizer: with which it was trained.
    facts: the set.
  Returns:
    {"seen", "unseen", "two_hop"}: shares of exact answers; no "two_hop" if no
    question needs two facts.
  """
  asked = {
    "seen": (facts, True),
    "unseen": (facts, False),
    "two_hop": (facts_lib.two_hop(facts), True),
  }
  return {
    name: _share(loaded, tokenizer, sample(questions), is_seen)
    for name, (questions, is_seen) in asked.items()
    if questions
  }


def sample(facts: Sequence[Fact]) -> list[Fact]:
  """Returns the facts that are asked for: all, or the same `MOST` of them.

  They are drawn. Kinds of entities take turns in a set: every second fact would
  leave out half of the attributes.
  """
  if len(facts) <= MOST:
    return list(facts)
  return random.Random(0).sample(facts, MOST)


def _share(
  loaded: TrainedModel,
  tokenizer: Tokenizer,
  facts: Sequence[Fact],
  is_seen: bool,
) -> float:
  """Returns the share of facts that a model recalls."""
  prompts = [fact.prompt(is_seen, i) for i, fact in enumerate(facts)]
  expected = [facts_lib.answer_text(fact) for fact in facts]
  told = answers(loaded, tokenizer, prompts, longest(tokenizer, expected))
  right = [a == b for a, b in zip(told, expected, strict=True)]
  return sum(right) / len(right)


def longest(tokenizer: Tokenizer, texts: Sequence[str]) -> int:
  """Returns the most tokens of a text, a multiple of 8, and one to end it."""
  most = max(len(tokenizer.encode(text)) for text in texts) + 1
  return -(-most // 8) * 8


def answers(
  loaded: TrainedModel,
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  num_tokens: int,
) -> list[str]:
  """Returns the greedy continuations of prompts, up to the document's end.

  Args:
    loaded, tokenizer: the model.
    prompts: any number; batches of `BATCH` are filled up, for one program.
    num_tokens: of an answer, at most.
  """
  encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
  told = []
  for start in range(0, len(encoded), BATCH):
    part = encoded[start : start + BATCH]
    made = generate.generate(
      loaded.model,
      loaded.variables,
      part + part[:1] * (BATCH - len(part)),
      Sampling(num_tokens, temperature=0.0),
      jax.random.key(0),
      eos_id=tokenizer.eos_id,
      padded_length=-(-max(map(len, encoded)) // 32) * 32,
    )
    told += [
      new_text(tokenizer, prompt_T.tolist(), tokens_T.tolist())
      for prompt_T, tokens_T in zip(part, made, strict=False)
    ]
  return told
