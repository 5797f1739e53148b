"""Packing: documents end to end, cut into rows of seq_len tokens.

A document is bos, its text, eos. Documents follow each other without gaps; a
row is seq_len + 1 consecutive tokens of that stream: the first seq_len are
inputs, the last seq_len targets. The next row begins with the last token of
this one, so that each token is a target exactly once.

A document that does not fit goes on in the next row, as a segment of its
own: attention cannot look into the row before, so positions restart at 0.

With `data.packing = "examples"` each document has a row of its own instead, and
padding after it.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from ultramem_jax.data import encoding
from ultramem_jax.data.documents import Document, DocumentLane
from ultramem_jax.data.encoding import Encoded
from ultramem_jax.data.tokenizer import Tokenizer
from ultramem_jax.settings.data import DataConfig
from ultramem_jax.settings.errors import DataError

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


class Piece(NamedTuple):
  """The tokens of a document from start up to, but without, stop."""

  document: Encoded
  start: int
  stop: int


def byte_counts(piece: Piece) -> np.ndarray:
  """Returns how many bytes of text each token of a piece stands for.

  A document's b bytes are shared evenly by its n targets that count, which are
  all tokens except bos, or those of answers: target i takes
  floor((i + 1) b / n) - floor(i b / n). So their sum is exact, and no tokenizer
  has to say which bytes a token covers.

  Returns:
    [stop - start] int64; 0 for what is not a target that counts.
  """
  document, start, stop = piece
  edges = document.learned_before(np.arange(start, stop + 1))
  targets = sum(end - begin for begin, end in document.learned)
  return np.diff(edges * document.num_bytes // targets)


def weights(piece: Piece) -> np.ndarray:
  """Returns 1 for each token of a piece that counts as a target, else 0.

  A document's first token never does: nothing in a document says that another
  one follows it.
  """
  _, start, stop = piece
  return np.diff(piece.document.learned_before(np.arange(start, stop + 1)))


def fitting(document: Encoded, data: DataConfig) -> Piece:
  """Returns the piece of a document that a row of its own has room for.

  Raises:
    DataError: the document is longer, and `data.long_examples` does not say
      that it is cut, or none of its targets that count would be left.
  """
  size, room = len(document.tokens_T), data.seq_len + 1
  if size <= room:
    return Piece(document, 0, size)
  if data.long_examples == "refuse":
    raise DataError(
      f"an example of {size} tokens does not fit into a row, which holds "
      f"data.seq_len = {data.seq_len} and one more; make rows longer, or set "
      "data.long_examples = 'cut'"
    )
  begin = document.learned[0][0]
  if begin >= room:
    raise DataError(
      f"an example has {begin} tokens before its first answer, of which a row "
      f"of data.seq_len = {data.seq_len} holds nothing; make rows longer"
    )
  return Piece(document, 0, room)


class Packer:
  """Fills rows from an iterator of documents; empty texts are left out."""

  def __init__(
    self, documents: Iterator[Document], tokenizer: Tokenizer, data: DataConfig
  ):
    """Packs documents, which may be endless, as `data.packing` says."""
    self._documents, self._tokenizer, self._data = documents, tokenizer, data
    self._concat = data.packing == "concat"
    self._document: Encoded | None = None
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
    is_alone = self._data.packing == "examples"
    pieces = self._take_one() if is_alone else self._take(length)
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
      stream["weights"][place] = weights(piece)
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

  def _take_one(self) -> list[Piece]:
    """Takes the next document, as the piece that a row has room for."""
    document = self._next_document()
    return [fitting(document, self._data)] if document else []

  def _next_document(self) -> Encoded | None:
    """Reads the next document with text; None if there is none."""
    document = next(self._documents, None)
    while document == "":
      document = next(self._documents, None)
    if document is None:
      return None
    return encoding.encode(document, self._tokenizer)


class Lane(Packer):
  """A Packer of an endless lane of documents, resumable as the lane is.

  The state is that of the lane before the current document, and the offset in
  that document.
  """

  def __init__(
    self, lane: DocumentLane, tokenizer: Tokenizer, data: DataConfig
  ):
    super().__init__(lane, tokenizer, data)
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

  def _next_document(self) -> Encoded | None:
    self._before = self._lane.get_state()
    return super()._next_document()
