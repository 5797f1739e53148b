"""Tokenizers: bytes, or any Hugging Face tokenizer.json.

Both kinds are immutable, have the same six members and never produce a
special token from text: `encode` adds none, and `decode` leaves them out.
"""

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError

# How published tokenizers name their special tokens; the first found is taken.
EOS_NAMES = ("<eos>", "</s>", "<|endoftext|>", "<|end_of_text|>", "[EOS]")
BOS_NAMES = ("<bos>", "<s>", "<|begin_of_text|>", "<|startoftext|>", "[BOS]")
PAD_NAMES = ("<pad>", "<|padding|>", "<|pad|>", "[PAD]")


class Tokenizer(Protocol):
  """What the data pipeline and generation need of a tokenizer."""

  vocab_size: int
  bos_id: int
  eos_id: int
  pad_id: int

  def encode(self, text: str) -> np.ndarray:
    """Returns the [T] int32 ids of a text, without bos and eos."""
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids; skips specials and ids beyond the vocabulary."""
    ...


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
  """A tokenizer.json, set to find no specials in a text and to cut none."""

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
    # The batch form is half again as fast: it does not record where tokens lie.
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
      are found by their usual names. If it has no bos, documents begin with
      eos, as with GPT-NeoX; if it has no pad, eos pads (its weight is 0).
  Returns:
    The tokenizer.
  Raises:
    ConfigError: there is no such file, it is not a tokenizer file, or it has
      no eos.
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
  if eos_id is None:
    raise ConfigError(
      f"{field} = {name!r}: has no end-of-text token; known names: "
      f"{', '.join(EOS_NAMES)}"
    )
  bos_id = _first_id(tokenizer, BOS_NAMES)
  pad_id = _first_id(tokenizer, PAD_NAMES)
  return FileTokenizer(
    tokenizer,
    bos_id=eos_id if bos_id is None else bos_id,
    eos_id=eos_id,
    pad_id=eos_id if pad_id is None else pad_id,
  )


def _first_id(tokenizer: Any, names: Sequence[str]) -> int | None:
  """Returns the id of the first of names that the tokenizer knows."""
  ids = map(tokenizer.token_to_id, names)
  return next((i for i in ids if i is not None), None)


def check_vocab(vocab_size: int, tokenizer: Tokenizer) -> None:
  """Raises ConfigError unless a model of vocab_size can embed every id."""
  require(
    vocab_size >= tokenizer.vocab_size,
    "model.vocab_size",
    vocab_size,
    f"must be at least {tokenizer.vocab_size}, the tokenizer's size",
  )
