"""Documents as tokens, and which of them are learned."""

import itertools
from typing import NamedTuple

import numpy as np

from ultramem_jax.data.documents import Document
from ultramem_jax.data.tokenizer import Tokenizer


class Encoded(NamedTuple):
  """The tokens of a document.

  tokens_T: [T] int32.
  learned: the targets that count, as (start, stop) in tokens_T, in order; the
    first token, which nothing predicts, is in none of them.
  num_bytes: how many bytes of text, in UTF-8, they stand for.
  """

  tokens_T: np.ndarray
  learned: tuple[tuple[int, int], ...]
  num_bytes: int

  def learned_before(self, places: np.ndarray) -> np.ndarray:
    """Returns how many targets that count lie before places; int64."""
    counts = np.zeros(places.shape, np.int64)
    for start, stop in self.learned:
      counts += np.clip(places - start, 0, stop - start)
    return counts


def encode(document: Document, tokenizer: Tokenizer) -> Encoded:
  """Encodes a document.

  A text becomes bos, its tokens and eos; all but bos are learned. So does a
  prompt with an answer, of which the answer and eos are learned. A chat has the
  tokens that its template names, and no others.

  A prompt has the tokens that it has when a model is asked to go on with it:
  none reaches from it into the answer.
  """
  if isinstance(document, str):
    ids = tokenizer.encode(document)
    tokens_T = np.empty(len(ids) + 2, np.int32)
    tokens_T[0], tokens_T[-1] = tokenizer.bos_id, tokenizer.eos_id
    tokens_T[1:-1] = ids
    learned = ((1, len(tokens_T)),)
    return Encoded(tokens_T, learned, len(document.encode()))
  parts, size, learned, before = [], 0, [], ""
  if not document.is_chat:
    parts, size = [np.array([tokenizer.bos_id], np.int32)], 1
  borders = [0, *itertools.chain(*document.answers), len(document.text)]
  for number, (start, stop) in enumerate(itertools.pairwise(borders)):
    text = document.text[start:stop]
    ids = _after(before, text, tokenizer, document.is_chat)
    if number % 2:
      learned.append((max(1, size), size + len(ids)))
    parts.append(ids)
    size, before = size + len(ids), text
  if not document.is_chat:
    parts.append(np.array([tokenizer.eos_id], np.int32))
    learned[-1] = learned[-1][0], size + 1
  return Encoded(np.concatenate(parts), tuple(learned), document.num_bytes)


def _after(
  before: str, text: str, tokenizer: Tokenizer, is_chat: bool
) -> np.ndarray:
  """Returns the tokens of a text that follows another one.

  If a token would reach across the border, they are those that it has at the
  beginning of a line. By itself, a text may have one more space.
  """
  for context in (before, "\n") if before else ():
    context_T = tokenizer.encode(context, is_chat)
    whole_T = tokenizer.encode(context + text, is_chat)
    if np.array_equal(whole_T[: len(context_T)], context_T):
      return whole_T[len(context_T) :]
  return tokenizer.encode(text, is_chat)
