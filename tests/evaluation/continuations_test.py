"""Continuations and stop strings, where text depends on the tokens before."""

import numpy as np
import pytest

from tests.words import Words
from ultramem_jax.evaluation import scoring
from ultramem_jax.serve import generate
from ultramem_jax.settings.sampling import Sampling


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


def test_a_special_token_ends_a_text_that_does_not_show_it(slow, monkeypatch):
  scorer = scoring.Scorer(slow.run)
  monkeypatch.setattr(scorer, "_tokenizer", Words())
  asked = []

  def fake(model, variables, prompts, *rest, finished, **options):
    made = [np.array(ids, np.int32) for ids in ([3, 5, 4], [3, 4, 4])]
    asked.extend(finished(made))
    return made

  monkeypatch.setattr(generate, "generate", fake)
  sampling = Sampling(3, temperature=0.0)
  texts = scorer.continuations(["the", "the"], ["<end>"], sampling)
  assert texts == [" brown", " brown fox fox"]
  assert asked == [True, False]
