"""The text of new tokens, where it depends on the tokens before."""

import numpy as np

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


def test_the_space_after_a_prompt_is_new_text(monkeypatch):
  monkeypatch.setattr(
    generate,
    "generate",
    lambda model, variables, prompts, *rest, **options: [
      np.array([3, 4], np.int32) for _ in prompts
    ],
  )
  texts = generate.generate_text(
    None, None, Words(), ["the quick", ""], Sampling(2), seed=0
  )
  assert texts == [" brown fox", "brown fox"]
