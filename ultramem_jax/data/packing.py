"""Packing: documents end to end, cut into rows of seq_len tokens.

A document is bos, its text, eos. Documents follow each other without gaps; a
row is seq_len + 1 consecutive tokens of that stream: the first seq_len are
inputs, the last seq_len targets. The next row begins with the last token of
this one, so that each token is a target exactly once.

A document that does not fit goes on in the next row, as a segment of its
own: attention cannot look into the row before, so positions restart at 0.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ultramem_jax.data.documents import DocumentLane
from ultramem_jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]


def empty_stream(
  rows: int, seq_len: int, pad_id: int, with_bytes: bool
) -> Batch:
  """Returns rows of seq_len + 1 tokens, all padding, for `Packer.fill`.

  Args:
    rows: how many.
    seq_len: T; the first T tokens of a row are inputs, the last T targets.
    pad_id: the token that pads.
    with_bytes: adds the array `bytes`; see `byte_counts`.
  Returns:
    Arrays [rows, T + 1] by name: int32 tokens, segments, positions (and
    bytes), float32 weights.
  """
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
    Arrays [rows, T] by name: tokens, segments and positions of the inputs;
    targets, and the targets' weights, and bytes if the stream has them. The
    weights are float32, the others int32.
  """
  batch = {"targets": np.ascontiguousarray(stream["tokens"][:, 1:])}
  for name, values in stream.items():
    of_targets = name in ("weights", "bytes")
    cut = values[:, 1:] if of_targets else values[:, :-1]
    batch[name] = np.ascontiguousarray(cut)
  return batch


class Document(NamedTuple):
  """The tokens of bos, a text and eos, and the text's size in UTF-8 bytes."""

  tokens_T: np.ndarray
  num_bytes: int


class Piece(NamedTuple):
  """The tokens of a document from start up to, but without, stop."""

  document: Document
  start: int
  stop: int


def encode(text: str, tokenizer: Tokenizer) -> Document:
  """Encodes a text as a document."""
  ids = tokenizer.encode(text)
  tokens_T = np.empty(len(ids) + 2, np.int32)
  tokens_T[0], tokens_T[-1] = tokenizer.bos_id, tokenizer.eos_id
  tokens_T[1:-1] = ids
  return Document(tokens_T, len(text.encode()))


def byte_counts(piece: Piece) -> np.ndarray:
  """Returns how many bytes of text each token of a piece stands for.

  A document's b bytes are shared evenly by its n targets, which are all its
  tokens except bos: target i takes floor((i + 1) b / n) - floor(i b / n). So
  their sum is exact, and no tokenizer has to say which bytes a token covers.

  Returns:
    [stop - start] int64; 0 for bos.
  """
  document, start, stop = piece
  targets = len(document.tokens_T) - 1
  edges = np.arange(start - 1, stop, dtype=np.int64).clip(0)
  return np.diff(edges * document.num_bytes // targets)


class Packer:
  """Fills rows from an iterator of texts; empty texts are left out."""

  def __init__(
    self, documents: Iterator[str], tokenizer: Tokenizer, packing: str
  ):
    """Packs documents, which may be endless, in the mode `data.packing`."""
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
      Whether there was a target left to write; if not, the row is unchanged.
    """
    length = stream["tokens"].shape[1]
    pieces = self._take(length)
    if sum(piece.stop - piece.start for piece in pieces) < 2:
      return False
    begin = 0
    for segment, piece in enumerate(pieces, 1):
      end = begin + piece.stop - piece.start
      place = row, slice(begin, end)
      tokens_T = piece.document.tokens_T
      stream["tokens"][place] = tokens_T[piece.start : piece.stop]
      stream["segments"][place] = 1 if self._concat else segment
      stream["positions"][place] = np.arange(end - begin)
      stream["weights"][place] = 1
      if piece.start == 0:
        # Nothing in a document says that another one follows it.
        stream["weights"][row, begin] = 0
      if "bytes" in stream:
        stream["bytes"][place] = byte_counts(piece)
      begin = end
    if self._concat:
      stream["positions"][row] = np.arange(length)
    return True

  def _take(self, length: int) -> list[Piece]:
    """Takes the next length tokens, in pieces; fewer at the end."""
    pieces = []
    while length:
      if self._document is None:
        self._document = self._next_document()
      if self._document is None:
        break
      stop = min(self._offset + length, len(self._document.tokens_T))
      pieces.append(Piece(self._document, self._offset, stop))
      length -= stop - self._offset
      if length:
        self._document, self._offset = None, 0
      else:
        self._offset = stop - 1  # the last token is the next row's first
    return pieces

  def _next_document(self) -> Document | None:
    """Reads the next document with text; None if there is none."""
    text = next(self._documents, None)
    while text == "":
      text = next(self._documents, None)
    return None if text is None else encode(text, self._tokenizer)


class Lane(Packer):
  """A Packer of an endless lane of documents, resumable as the lane is.

  The state is that of the lane before the current document, and the offset in
  that document.
  """

  def __init__(self, lane: DocumentLane, tokenizer: Tokenizer, packing: str):
    super().__init__(lane, tokenizer, packing)
    self._lane, self._before = lane, lane.get_state()

  def get_state(self) -> dict[str, Any]:
    """Returns where the next row begins, fit for JSON."""
    if self._document is None:
      self._before = self._lane.get_state()
    return {"documents": self._before, "offset": self._offset}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where a state was taken."""
    self._lane.set_state(state["documents"])
    self._document, self._offset = None, state["offset"]

  def _next_document(self) -> Document | None:
    self._before = self._lane.get_state()
    return super()._next_document()
