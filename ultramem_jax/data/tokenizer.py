"""Tokenizers: bytes, or any Hugging Face tokenizer.json.

Both kinds are immutable, have the same six members and never produce a special
token from text: `encode` adds none, unless the text is a chat template's, and
`decode` leaves them out.
"""

import contextlib
import functools
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from ultramem_jax.data import chat, specials
from ultramem_jax.data.specials import Specials
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError, first_line

# Most vocabularies do not hold all of it.
_ANY_TEXT = "a text\n\0 \xe9 \u6f22 \U0001f600"
# Beyond any vocabulary that is in use. The library goes through all ids up to
# the largest, whether there are such tokens or not.
IDS_END = 2**23
# How many characters are encoded to see whether text stays as it is.
_COMPARED = 2000


class Tokenizer(Protocol):
  """What the data pipeline and generation need of a tokenizer.

  special_names: of its special tokens, by id, as texts may name them.
  """

  vocab_size: int
  special_names: Mapping[int, str]
  bos_id: int
  eos_id: int
  pad_id: int

  def encode(self, text: str, names_specials: bool = False) -> np.ndarray:
    """Returns the [T] int32 ids of a text, without bos and eos.

    Args:
      text: what to encode.
      names_specials: special tokens that the text names are meant, as in what
        a chat template writes; bytes have no such names.
    """
    ...

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids; skips specials and ids beyond the vocabulary."""
    ...


class ByteTokenizer:
  """UTF-8 bytes as ids 0 to 255, then pad, bos and eos."""

  vocab_size = 259
  special_names: Mapping[int, str] = types.MappingProxyType({})
  pad_id = 256
  bos_id = 257
  eos_id = 258

  def encode(self, text: str, names_specials: bool = False) -> np.ndarray:
    return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    return bytes(i for i in ids if i < 256).decode(errors="replace")


class FileTokenizer:
  """A tokenizer.json, set to find no specials in a text and to cut none.

  Args:
    tokenizer: of the library `tokenizers`.
    names: its special tokens; without bos, eos begins a text, without pad, eos
      pads.
  Attributes:
    names: its special tokens, as given.
  """

  def __init__(self, tokenizer: Any, names: Specials):
    # A file may ask for these, which are meant for other uses.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
      tokenizer.model.dropout = None  # a text would have other tokens each time
    # Whatever the file says of them, these are not text. Those that it calls
    # special keep what else it says, such as that they swallow a space.
    chosen = names.bos, names.eos, names.pad
    added = tokenizer.get_added_tokens_decoder().values()
    known = {token.content for token in added if token.special}
    tokenizer.add_special_tokens(sorted({*chosen} - known - {""}))
    # "<eos>" written in a document is five characters, not the end.
    tokenizer.encode_special_tokens = True
    self._tokenizer = tokenizer
    # Ids may have gaps, so the size is the largest id, not a count.
    self.vocab_size = max(tokenizer.get_vocab().values()) + 1
    self.bos_id, self.eos_id, self.pad_id = (
      tokenizer.token_to_id(name or names.eos) for name in chosen
    )
    self.names = names
    self.special_names: Mapping[int, str] = {
      id: token.content
      for id, token in tokenizer.get_added_tokens_decoder().items()
      if token.special
    }
    special = {
      id: name
      for id, name in self.special_names.items()
      if name != names.unknown
    }
    self._is_special = np.zeros(self.vocab_size, bool)
    self._is_special[list(special)] = True
    inside = (
      f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})"
      for name in special.values()
    )
    self._inside_special = re.compile("|".join(inside))

  def encode(self, text: str, names_specials: bool = False) -> np.ndarray:
    if names_specials:
      found = self._naming_specials.encode(text, add_special_tokens=False)
      return np.array(found.ids, np.int32)
    ids_T = self._encode(text)
    if not self._is_special[ids_T].any():
      return ids_T
    # The vocabulary itself may hold a special token as a piece of text.
    parts = map(self._encode, self._inside_special.split(text))
    ids_T = np.concatenate([*parts])
    return ids_T[~self._is_special[ids_T]]

  @functools.cached_property
  def _naming_specials(self) -> Any:
    """The same tokenizer, to which the names of specials are not text."""
    copy = type(self._tokenizer).from_str(self._tokenizer.to_str())
    copy.encode_special_tokens = False
    return copy

  def _encode(self, text: str) -> np.ndarray:
    # The batch form is half again as fast: it does not record where tokens lie.
    encodings = self._tokenizer.encode_batch_fast(
      [text], add_special_tokens=False
    )
    return np.array(encodings[0].ids, np.int32)

  def decode(self, ids: Sequence[int]) -> str:
    known = [int(i) for i in ids if i < self.vocab_size]
    return self._tokenizer.decode(known, skip_special_tokens=True)


def load(name: str, bos: str = "", eos: str = "", pad: str = "") -> Tokenizer:
  """Loads the tokenizer that `data.tokenizer` names.

  Args:
    name: "bytes", or a Hugging Face tokenizer.json, or the folder of one.
    bos, eos, pad: the names of its special tokens; "": `specials.find` looks
      for them. If it has no bos, documents begin with eos, as with GPT-NeoX; if
      it has no pad, eos pads (its weight is 0).
  Returns:
    The tokenizer.
  Raises:
    ConfigError: there is no such file, it is not a whole tokenizer file, or it
      does not have such tokens, or no eos.
  """
  given = {"bos": bos, "eos": eos, "pad": pad}
  if name == "bytes":
    for role, token in given.items():
      require(not token, f"data.{role}_token", token, "bytes have their own")
    return ByteTokenizer()
  path = _path(name)
  require(
    os.path.isfile(path),
    "data.tokenizer",
    name,
    "no such file; must be 'bytes' or the path of a tokenizer.json",
  )
  try:
    tokenizer = read(path)
  except ValueError as error:
    raise ConfigError(f"data.tokenizer = {name!r}: {error}") from error
  return FileTokenizer(tokenizer, specials.find(tokenizer, path, given))


def read(path: str) -> Any:
  """Reads a tokenizer.json, and tries whether it works.

  Returns:
    A tokenizer of the library `tokenizers`.
  Raises:
    ValueError: it is damaged, or does not work; in one line.
  """
  import tokenizers  # here, so that bytes need nothing installed

  try:
    with _no_standard_error():
      tokenizer = tokenizers.Tokenizer.from_file(path)
      tokenizer.decode(tokenizer.encode(_ANY_TEXT).ids)
  except (KeyboardInterrupt, SystemExit):
    raise
  except BaseException as error:
    # The library raises nothing more precise. Where it is not prepared for
    # what a file says, it writes a report to the standard error and raises
    # what is not an Exception.
    message = f"is not a tokenizer.json ({first_line(error)})"
    raise ValueError(message) from error
  largest = max(tokenizer.get_vocab().values(), default=0)
  if largest >= IDS_END:
    raise ValueError(f"has a token of the id {largest}: must be < {IDS_END}")
  return tokenizer


@contextlib.contextmanager
def _no_standard_error() -> Iterator[None]:
  """Drops what is written to the standard error, by any language."""
  kept = os.dup(2)
  nowhere = os.open(os.devnull, os.O_WRONLY)
  os.dup2(nowhere, 2)
  try:
    yield
  finally:
    os.dup2(kept, 2)
    os.close(nowhere)
    os.close(kept)


def files(name: str) -> dict[str, str]:
  """Returns the files that a tokenizer consists of; none for "bytes".

  Returns:
    {usual name: path}; a folder with these names is the same tokenizer.
  """
  if name == "bytes":
    return {}
  path = _path(name)
  folder = os.path.dirname(path)
  names = (*specials.DECLARING, chat.FILE_NAME)
  beside = {n: os.path.join(folder, n) for n in names}
  there = {n: other for n, other in beside.items() if os.path.isfile(other)}
  return {"tokenizer.json": path, **there}


def _path(name: str) -> str:
  """Returns the path of the tokenizer.json that a name means."""
  path = os.path.expanduser(name)
  return os.path.join(path, "tokenizer.json") if os.path.isdir(path) else path


def encode_prompt(tokenizer: Tokenizer, text: str) -> np.ndarray:
  """Returns bos and the ids of a text, [T] int32."""
  return np.append(np.int32(tokenizer.bos_id), tokenizer.encode(text))


def new_text(
  tokenizer: Tokenizer, before: Sequence[int], new: Sequence[int]
) -> str:
  """Returns the text that new tokens add to those before.

  Decoded by themselves they may lack the space at their beginning, or have one
  too many, and half a character cannot be decoded.
  """
  old = tokenizer.decode(before)
  text = tokenizer.decode([*before, *new])
  return text[_shared(old, text) :]


def change(tokenizer: Tokenizer, texts: Iterable[str]) -> str:
  """Returns how the first text changes that decodes to another one, or "".

  A tokenizer may write it in small letters, without accents or other spaces.
  """
  for text in texts:
    text = text[:_COMPARED]
    back = tokenizer.decode(tokenizer.encode(text).tolist())
    if back != text:
      start = max(0, _shared(text, back) - 8)
      one, other = (x[start : start + 24] for x in (text, back))
      return f"the tokenizer changes text: {one!r} comes back as {other!r}"
  return ""


def _shared(one: str, other: str) -> int:
  """Returns how many characters two texts begin with alike."""
  if other.startswith(one):
    return len(one)
  pairs = enumerate(zip(one, other, strict=False))
  return next((i for i, (a, b) in pairs if a != b), len(other))


def check_vocab(vocab_size: int, tokenizer: Tokenizer) -> None:
  """Raises ConfigError unless a model of vocab_size can embed every id."""
  require(
    vocab_size >= tokenizer.vocab_size,
    "model.vocab_size",
    vocab_size,
    f"must be at least {tokenizer.vocab_size}, the tokenizer's size",
  )
