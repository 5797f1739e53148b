"""A tokenizer whose texts depend on the tokens before."""

import numpy as np


class Words:
  """Tokens are words; spaces stand only between them."""

  bos_id = eos_id = 0
  words = ("", "the", "quick", "brown", "fox", "<end>")
  special_names = {5: "<end>"}  # noqa: RUF012

  def encode(self, text):
    return np.array([self.words.index(w) for w in text.split()], np.int32)

  def decode(self, ids):
    shown = (i for i in ids if i and i not in self.special_names)
    return " ".join(self.words[i] for i in shown)
