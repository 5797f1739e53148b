"""Local text files as documents with random access.

A file is one document, or holds many: JSON lines, rows; `formats` says which
names mean what. Nothing is kept in memory: a document is a place (file, offset,
length), read when asked for. `text_index` finds the places.
"""

import hashlib
import itertools
import os
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np

from ultramem_jax.data import formats, json_lines
from ultramem_jax.data.documents import Document, content_of
from ultramem_jax.data.find import TextFile
from ultramem_jax.data.forms import Form
from ultramem_jax.settings.errors import DataError

# What is read at once to find where a document is cut.
_WINDOW_BYTES = 1 << 20

# Columns of places.
FILE, LINE, OFFSET, LENGTH, DIGEST = range(5)


class TextDocuments:
  """The non-empty documents of files, a sequence; `text_index` makes it.

  Args:
    files: where the documents lie.
    unpacked: the contents of those among them that are compressed, or rows.
    places: [documents, 5] int64: the number of the file, the line or row
      (from 1; 0 = the whole file), offset and length in bytes, in the file or
      in unpacked, and the `digest` of its content; 0 = unknown.
    form: how records hold documents.
    undecodable: how many bytes are not UTF-8, and become U+FFFD.
  """

  def __init__(
    self,
    files: list[TextFile],
    unpacked: BinaryIO,
    places: np.ndarray,
    form: Form,
    undecodable: int,
  ):
    self._files, self._unpacked = files, unpacked
    self._places, self._form = places, form
    self.undecodable = undecodable

  def __len__(self) -> int:
    return len(self._places)

  def __repr__(self) -> str:
    return f"TextDocuments({len(self)} in {len(self._files)} files)"

  def __getitem__(self, index: int) -> Document:
    """Returns a document.

    Raises:
      DataError: its file is not what was indexed.
      OSError: its file cannot be read any more.
    """
    number, line, offset, length, known = map(int, self._places[index])
    path = self._files[number].path
    data = self._read(number, offset, length)
    document, content = data.decode(errors="replace"), data
    if self._is_json(number, line):
      try:
        document = json_lines.parse(data, self.where(index), self._form)
      except ValueError as error:
        raise DataError(f"{error}; it was changed while in use") from error
      content = content_of(document)
    if known and digest(content) != known:
      raise DataError(f"{path}: was changed while in use")
    return document

  def where(self, index: int) -> str:
    """Returns the file of a document, and its line or row, for errors."""
    number, line = map(int, self._places[index][[FILE, LINE]])
    path = self._files[number].path
    unit = "row" if formats.named(path).kind in formats.ROWS else "line"
    return f"{path}, {unit} {line}" if line else path

  def _is_json(self, number: int, line: int) -> bool:
    kind = formats.named(self._files[number].path).kind
    # Rows that may be examples are unpacked as lines of JSON.
    return bool(line) and (kind not in formats.ROWS or self._form.has_answers)

  def _read(self, number: int, offset: int, length: int) -> bytes:
    """Returns bytes of a file, unpacked."""
    path = self._files[number].path
    if formats.is_packed(path):
      data = os.pread(self._unpacked.fileno(), length, offset)
    else:
      # Opened anew each time: a corpus may have more files than a process
      # may hold open.
      with open(path, "rb", buffering=0) as stream:
        data = os.pread(stream.fileno(), length, offset)
    if len(data) < length:
      raise DataError(f"{path}: was cut short while in use")
    return data

  @property
  def num_bytes(self) -> int:
    """The size of all documents, unpacked."""
    return int(self._places[:, LENGTH].sum())

  @property
  def digests(self) -> np.ndarray:
    """The `digest` of each document, int64; 0 where it is unknown."""
    return self._places[:, DIGEST]

  def contents(self) -> dict[str, str]:
    """Returns size and digest of the documents in each file, by its name."""
    numbers, starts = np.unique(self._places[:, FILE], return_index=True)
    parts = np.split(self._places[:, [LINE, LENGTH, DIGEST]], starts[1:])
    return {
      self._files[number].name: fingerprint(
        int(part[:, 1].sum()), part.tobytes()
      )
      for number, part in zip(numbers, parts, strict=True)
    }

  def longest(self) -> tuple[str, int]:
    """Returns the file and the size in bytes of the longest document."""
    place = self._places[self._places[:, LENGTH].argmax()]
    return self._files[place[FILE]].path, int(place[LENGTH])

  def held_out(self, fraction: float) -> np.ndarray:
    """Returns for each document whether a hash of its name holds it out.

    Args:
      fraction: about this share of the documents is held out.
    """
    limit = fraction * 2**64
    names = (
      f"{self._files[number].name}:{line}" if line else self._files[number].name
      for number, line in self._places[:, :2].tolist()
    )
    return np.array([_hash(name) < limit for name in names], bool)

  def subset(self, mask: np.ndarray) -> "TextDocuments":
    """Returns the documents where the mask is True."""
    return self._at(self._places[mask])

  def can_be_cut(self) -> bool:
    """Returns whether every document is text by itself, not a line of JSON."""
    return not any(
      self._is_json(number, line) for number, line in self._places[:, :2]
    )

  def cut(self, limit: int) -> "TextDocuments":
    """Cuts texts of more than limit bytes into several documents each.

    A text is cut at the last end of a line that fits, or, where a line is
    longer than limit, between two characters. Lines of JSON stay whole.
    """
    parts, done = [], 0
    for index in np.flatnonzero(self._places[:, LENGTH] > limit):
      place = self._places[index].tolist()
      if not self._is_json(place[FILE], place[LINE]):
        ends = _piece_ends(self._reader(place), place[LENGTH], limit)
        pieces = np.array([*_pieces(place, [*ends])], np.int64)
        parts += [self._places[done:index], pieces]
        done = index + 1
    return self._at(np.concatenate([*parts, self._places[done:]]))

  def cut_off(self, fraction: float) -> tuple["TextDocuments", "TextDocuments"]:
    """Cuts the last part off every text, at the end of a line if it can be.

    Args:
      fraction: about the share of each text that is cut off.
    Returns:
      (the beginnings, the ends), without empty ones.
    """
    cut = []
    for place in self._places.tolist():
      length = place[LENGTH]
      goal = length - max(1, round(length * fraction))
      # A line that ends earlier would hold out more than twice the share.
      least = max(0, 2 * goal - length)
      cut += _pieces(place, [_end_before(self._reader(place), goal, least)])
    places = np.array(cut, np.int64)
    has_text = places[:, LENGTH] > 0
    begins = np.arange(len(places)) % 2 == 0
    return self._at(places[begins & has_text]), self._at(
      places[~begins & has_text]
    )

  def _reader(self, place: list[int]) -> Callable[[int, int], bytes]:
    """Returns the function that reads (offset, length) of a document."""
    number, _, offset, length, _ = place
    return lambda start, count: self._read(
      number, offset + start, min(count, length - start)
    )

  def _at(self, places: np.ndarray) -> "TextDocuments":
    """Returns the documents at other places in the same files."""
    return TextDocuments(
      self._files, self._unpacked, places, self._form, self.undecodable
    )


def digest(data: bytes) -> int:
  """Returns the signed 64-bit digest of what a document holds."""
  found = hashlib.blake2b(data, digest_size=8).digest()
  return int.from_bytes(found, "big", signed=True)


def fingerprint(size: int, data: bytes) -> str:
  """Returns the size of a file and a digest of data, as `inputs.json` has it.

  Args:
    size: of the file.
    data: the file, or parts of it.
  """
  found = hashlib.blake2b(data, digest_size=16).hexdigest()
  return f"{size} bytes, {found}"


def _pieces(place: list[int], ends: list[int]) -> Iterator[list[int]]:
  """Yields the places of the pieces of a document that is cut at ends."""
  number, line, offset, length, _ = place
  for start, end in itertools.pairwise([0, *ends, length]):
    yield [number, line, offset + start, end - start, 0]


def _piece_ends(
  read: Callable[[int, int], bytes], length: int, limit: int
) -> Iterator[int]:
  """Yields where a text is cut into pieces of 1 to limit bytes.

  The end of the text is not among the places.
  """
  start = base = 0
  data = b""
  while length - start > limit:
    if base + len(data) < start + limit + 1:
      base, data = start, read(start, max(_WINDOW_BYTES, limit + 1))
    at = start - base
    end = data.rfind(b"\n", at, at + limit) + 1
    if end <= at:
      end = at + limit
      # Not before the second, third or fourth byte of a character.
      while end > at + 1 and data[end] & 0xC0 == 0x80:
        end -= 1
    start = base + end
    yield start


def _end_before(
  read: Callable[[int, int], bytes], goal: int, least: int
) -> int:
  """Returns the last place up to goal where a text is best cut in two.

  It is the end of a line, if one lies between least and goal.
  """
  start = max(0, goal - _WINDOW_BYTES)
  data = read(start, goal + 1 - start)
  end = data.rfind(b"\n", max(0, least - start), goal - start) + 1
  if not end:
    end = goal - start
    while end > 0 and data[end] & 0xC0 == 0x80:
      end -= 1
  return start + end


def _hash(name: str) -> int:
  """Returns the 64-bit hash of a name, the same on every machine."""
  data = name.encode(errors="surrogateescape")
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
