"""Packing: documents end to end, cut into rows of seq_len tokens.

A document is bos, its text, eos. Documents follow each other without gaps; a
row is seq_len + 1 consecutive tokens of that stream, of which the first
seq_len are inputs and the last seq_len targets, and the next row begins with
the last token of this one. So each token is a target exactly once.

A document that does not fit goes on in the next row, as a segment of its
own: attention cannot look into the row before, so positions restart at 0.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ultramem_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


def empty_stream(
  rows: int, seq_len: int, pad_id: int, with_bytes: bool
) -> Batch:
  """Rows of seq_len + 1 tokens, all padding, for `Packer.fill`."""
  shape = (rows, seq_len + 1)
  stream = {
    "tokens": np.full(shape, pad_id, np.int32),
    "weights": np.zeros(shape, np.float32),
    "segments": np.zeros(shape, np.int32),
    "positions": np.zeros(shape, np.int32),
  }
  if with_bytes:
    stream["bytes"] = np.zeros(shape, np.int32)
  return stream


def to_batch(stream: Batch) -> Batch:
  """Cuts rows of seq_len + 1 tokens into inputs and targets.

  Args:
    stream: what `empty_stream` made and `Packer.fill` filled.
  Returns:
    tokens, segments, positions (of inputs), targets, weights, bytes if there
    (of targets): [B, T] int32, weights float32.
  """
  batch = {"targets": np.ascontiguousarray(stream["tokens"][:, 1:])}
  for name, values in stream.items():
    of_targets = name in ("weights", "bytes")
    cut = values[:, 1:] if of_targets else values[:, :-1]
    batch[name] = np.ascontiguousarray(cut)
  return batch


class Document(NamedTuple):
  """bos, text, eos; and the UTF-8 bytes of the text."""

  tokens_N: np.ndarray
  num_bytes: int


class Piece(NamedTuple):
  """Tokens start to stop (exclusive) of a document."""

  document: Document
  start: int
  stop: int


def encode(text: str, tokenizer: Tokenizer) -> Document:
  """Makes a document of a text."""
  ids = tokenizer.encode(text)
  tokens_N = np.empty(len(ids) + 2, np.int32)
  tokens_N[0], tokens_N[-1] = tokenizer.bos_id, tokenizer.eos_id
  tokens_N[1:-1] = ids
  return Document(tokens_N, len(text.encode()))


def byte_counts(piece: Piece) -> np.ndarray:
  """The bytes of text that each token of a piece stands for as a target.

  A document's b bytes are shared evenly by its n targets, all tokens but
  bos: target i takes floor((i + 1) b / n) - floor(i b / n), so that their
  sum is exact and no tokenizer has to tell which bytes a token covers.
  """
  document, start, stop = piece
  targets = len(document.tokens_N) - 1
  edges = np.arange(start - 1, stop, dtype=np.int64).clip(0)
  return np.diff(edges * document.num_bytes // targets)


class Packer:
  """Fills rows from an iterator of texts; empty texts are left out."""

  def __init__(
    self, documents: Iterator[str], tokenizer: Tokenizer, packing: str
  ):
    """Args: documents, may be endless; tokenizer; `data.packing`."""
    self._documents, self._tokenizer = documents, tokenizer
    self._concat = packing == "concat"
    self._document: Document | None = None
    self._offset = 0  # in the document, of the next row's first token

  def fill(self, stream: Batch, row: int) -> bool:
    """Writes the next tokens into a row of `empty_stream`.

    Args:
      stream: the arrays to write to, all padding at row.
      row: which row.
    Returns:
      Whether a target was left; if not, the row stays as it is.
    """
    length = stream["tokens"].shape[1]
    pieces = self._take(length)
    if sum(piece.stop - piece.start for piece in pieces) < 2:
      return False
    begin = 0
    for segment, piece in enumerate(pieces, 1):
      end = begin + piece.stop - piece.start
      place = row, slice(begin, end)
      tokens_N = piece.document.tokens_N
      stream["tokens"][place] = tokens_N[piece.start : piece.stop]
      stream["segments"][place] = 1 if self._concat else segment
      stream["positions"][place] = np.arange(end - begin)
      stream["weights"][place] = 1
      if piece.start == 0:
        # Nothing in a document tells that another one follows it.
        stream["weights"][row, begin] = 0
      if "bytes" in stream:
        stream["bytes"][place] = byte_counts(piece)
      begin = end
    if self._concat:
      stream["positions"][row] = np.arange(length)
    return True

  def _take(self, length: int) -> list[Piece]:
    """The next length tokens as pieces of documents; fewer at the end."""
    pieces = []
    while length and (self._document is not None or self._load()):
      size = len(self._document.tokens_N)
      stop = min(self._offset + length, size)
      pieces.append(Piece(self._document, self._offset, stop))
      length -= stop - self._offset
      if length:
        self._document, self._offset = None, 0
      else:
        self._offset = stop - 1  # the last token is the next row's first
    return pieces

  def _load(self) -> bool:
    """Reads the next document with text; False if there is none."""
    text = ""
    while text == "":
      text = next(self._documents, None)
    if text is None:
      return False
    self._document = encode(text, self._tokenizer)
    return True


class Lane(Packer):
  """A Packer of an endless iterator that can be resumed, as it then can be.

  Its state is the iterator's before the current document, and the offset.
  """

  def get_state(self) -> dict[str, Any]:
    if self._document is None:
      return {"documents": self._documents.get_state(), "offset": self._offset}
    return {"documents": self._before, "offset": self._offset}

  def set_state(self, state: dict[str, Any]) -> None:
    self._documents.set_state(state["documents"])
    self._document, self._offset = None, state["offset"]

  def _load(self) -> bool:
    self._before = self._documents.get_state()
    return super()._load()
