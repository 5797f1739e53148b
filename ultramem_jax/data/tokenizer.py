"""Tokenizers: bytes, or any Hugging Face tokenizer.json.

Both kinds are immutable, have the same six members and never produce a
special token from text: `encode` gives the ids of the text alone, `decode`
leaves specials out.
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError

# Names under which published tokenizers hold their specials, best first.
EOS_NAMES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "[EOS]")
BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")
PAD_NAMES = ("<pad>", "<|padding|>", "<|pad|>", "[PAD]")


class Tokenizer(Protocol):
  """What the data pipeline and the sampler need of a tokenizer."""

  vocab_size: int
  bos_id: int
  eos_id: int
  pad_id: int

  def encode(self, text: str) -> np.ndarray:
    """The [N] int32 ids of text, without bos and eos."""

  def decode(self, ids: Sequence[int]) -> str:
    """The text of ids; specials and ids beyond the vocabulary are skipped."""


class ByteTokenizer:
  """UTF-8 bytes as ids 0 to 255, then pad, bos and eos."""

  vocab_size = 259
  pad_id = 256
  bos_id = 257
  eos_id = 258

  def encode(self, text: str) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
  """A tokenizer.json, made to treat text as text and never to cut it."""

  def __init__(self, tokenizer: Any, bos_id: int, eos_id: int, pad_id: int):
    # A file may ask for truncation or padding, meant for other uses.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    # "<eos>" written in a document is five characters, not the end.
    tokenizer.encode_special_tokens = True
    self._tokenizer = tokenizer
    # Ids may have gaps, so the size is the largest id, not a count.
    self.vocab_size = max(tokenizer.get_vocab().values()) + 1
    self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id

  def encode(self, text: str) -> np.ndarray:
    # The batch form is half again as fast: it leaves out where tokens lie.
    encodings = self._tokenizer.encode_batch_fast(
      [text], add_special_tokens=False
    )
    return np.array(encodings[0].ids, np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    known = [int(i) for i in ids if i < self.vocab_size]
    return self._tokenizer.decode(known, skip_special_tokens=True)


def load(name: str) -> Tokenizer:
  """Loads the tokenizer that `data.tokenizer` names.

  Args:
    name: "bytes", or the path of a Hugging Face tokenizer.json. Its specials
      are found by their usual names; without bos, documents begin with eos,
      as GPT-NeoX does; without pad, padding is eos (its weight is 0).
  Returns:
    The tokenizer.
  Raises:
    ConfigError: no such file, not a tokenizer file, or no eos in it.
  """
  if name == "bytes":
    return ByteTokenizer()
  field = "data.tokenizer"
  path = os.path.expanduser(name)
  require(
    os.path.isfile(path),
    field,
    name,
    "no such file; must be 'bytes' or the path of a tokenizer.json",
  )
  import tokenizers  # here, so that bytes need nothing installed

  try:
    tokenizer = tokenizers.Tokenizer.from_file(path)
  except Exception as error:  # the library raises nothing more precise
    raise ConfigError(
      f"{field} = {name!r}: is not a tokenizer.json ({error})"
    ) from error
  eos_id = _first_id(tokenizer, EOS_NAMES)
  require(
    eos_id is not None,
    field,
    name,
    f"has no end-of-text token; known names: {', '.join(EOS_NAMES)}",
  )
  bos_id = _first_id(tokenizer, BOS_NAMES, eos_id)
  pad_id = _first_id(tokenizer, PAD_NAMES, eos_id)
  return FileTokenizer(tokenizer, bos_id, eos_id, pad_id)


def _first_id(tokenizer, names, default=None):
  """The id of the first of names that the tokenizer knows."""
  ids = map(tokenizer.token_to_id, names)
  return next((i for i in ids if i is not None), default)


def check_vocab(vocab_size: int, tokenizer: Tokenizer) -> None:
  """Raises ConfigError unless a model of vocab_size can embed every id."""
  require(
    vocab_size >= tokenizer.vocab_size,
    "model.vocab_size",
    vocab_size,
    f"must be at least {tokenizer.vocab_size}, the tokenizer's size",
  )
