"""Continuations and stop strings, where text depends on the tokens before."""

import numpy as np
import pytest

from ultramem_jax.evaluation import scoring
from ultramem_jax.serve import generate
from ultramem_jax.settings.sampling import Sampling


class Words:
  """Tokens are words; spaces stand only between them."""

  bos_id = eos_id = 0
  words = ("", "the", "quick", "brown", "fox")

  def encode(self, text):
    return np.array([self.words.index(w) for w in text.split()], np.int32)

  def decode(self, ids):
    return " ".join(self.words[i] for i in ids if i)


@pytest.mark.parametrize(
  "stops, expected, calls",
  [
    ([], " brown fox", [False]),
    ([" "], "", [True]),
    ([" fox"], " brown", [True]),
    (["quick"], " brown fox", [False]),
  ],
)
def test_stop_strings_see_the_space_after_a_context(
  slow, monkeypatch, stops, expected, calls
):
  scorer = scoring.Scorer(slow.run)
  monkeypatch.setattr(scorer, "_tokenizer", Words())
  asked = []

  def fake(model, variables, prompts, *rest, finished, **options):
    made = [np.array([3, 4], np.int32) for _ in prompts]
    asked.extend(finished(made)[:1])
    return made

  monkeypatch.setattr(generate, "generate", fake)
  sampling = Sampling(2, temperature=0.0)
  assert scorer.continuations(["the quick"], stops, sampling) == [expected]
  assert asked == calls
