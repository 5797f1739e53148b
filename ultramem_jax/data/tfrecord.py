"""TFRecord files without TensorFlow: framing, and endless shuffled lanes.

A record is: length (8 bytes, little endian), checksum of the length (4),
data, checksum of the data (4). The checksums are not verified; a file that
ends inside a record is an error.
"""

import dataclasses
import math
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import numpy as np

from ultramem_jax.settings.errors import DataError

_HEADER = struct.Struct("<QI")  # length and its checksum
_FOOTER_BYTES = 4  # checksum of the data
_READ_AHEAD = 256  # records held at once when a file is read in order


@dataclasses.dataclass(frozen=True)
class Part:
  """The records first, first + stride, ... below stop of a file, from 0."""

  path: str
  first: int
  stop: int
  stride: int = 1

  def holds(self, record: int) -> bool:
    """Returns whether a record of the file, counted from 0, is in the part."""
    return record >= self.first and (record - self.first) % self.stride == 0


@dataclasses.dataclass(frozen=True)
class Block:
  """Consecutive records of a part, and where the next block begins."""

  records: list[bytes]
  next_record: int  # in the file, counted from 0
  next_byte: int


def read_block(part: Part, record: int, byte: int, limit: int) -> Block:
  """Reads up to limit records of a part.

  The file is opened and closed here: thousands of lanes may each be in the
  middle of one, more than a process may hold open.

  Args:
    part: which records of which file.
    record: number in the file of the record that starts at byte.
    byte: where to begin in the file.
    limit: at most this many records are returned.
  Returns:
    The Block.
  Raises:
    DataError: the file ends before record part.stop - 1 does.
  """
  records = []
  with open(part.path, "rb") as file:
    size = os.fstat(file.fileno()).st_size
    file.seek(byte)
    while record < part.stop and len(records) < limit:
      header = file.read(_HEADER.size)
      length = (
        _HEADER.unpack(header)[0] if len(header) == _HEADER.size else size
      )
      end = byte + _HEADER.size + length + _FOOTER_BYTES
      if end > size:
        raise DataError(
          f"{part.path}: ends inside record {record}, at byte {byte} of "
          f"{size}; {part.stop} records are needed"
        )
      if part.holds(record):
        records.append(file.read(length))
        file.seek(_FOOTER_BYTES, os.SEEK_CUR)
      else:
        file.seek(length + _FOOTER_BYTES, os.SEEK_CUR)
      record, byte = record + 1, end
  return Block(records, record, byte)


def blocks(file: Part) -> Iterator[Block]:
  """Yields all records of a file, in order, a few at a time."""
  block = Block([], 0, 0)
  while block.next_record < file.stop:
    block = read_block(file, block.next_record, block.next_byte, _READ_AHEAD)
    yield block


def parsed(part: Part, parse: Callable[[bytes], str], record: bytes) -> str:
  """Returns the text of a record; a DataError of parse names the file."""
  try:
    return parse(record)
  except DataError as error:
    raise DataError(f"{part.path}: {error}") from error


class RecordLane(Iterator[str]):
  """Yields the texts of the parts lane, lane + num_lanes, ..., shuffled.

  The parts come from an endless order that reshuffles them every epoch. Within
  a part, each block of `window` records is shuffled.
  """

  def __init__(
    self,
    parts: Sequence[Part],
    lane: int,
    num_lanes: int,
    seed: int,
    window: int,
    parse: Callable[[bytes], str],
  ):
    self._parts, self._num_lanes = parts, num_lanes
    self._seed, self._window, self._parse = seed, window, parse
    self._opened: tuple[int, Part] | None = None
    self._block: Block | None = None
    self.set_state({"part": lane, "record": 0, "byte": 0, "taken": 0})

  def get_state(self) -> dict[str, int]:
    """Returns the part, the block within it, and the records taken of it."""
    return {
      "part": self._part,
      "record": self._record,
      "byte": self._byte,
      "taken": self._taken,
    }

  def set_state(self, state: dict[str, int]) -> None:
    """Goes to where a state was taken."""
    self._part, self._taken = state["part"], state["taken"]
    self._record, self._byte = state["record"], state["byte"]
    self._block = None

  def __next__(self) -> str:
    while True:
      if self._block is None:
        self._block = self._read()
      if self._taken < len(self._block.records):
        self._taken += 1
        return parsed(
          self._current_part(),
          self._parse,
          self._block.records[self._taken - 1],
        )
      self._advance(self._block)

  def _current_part(self) -> Part:
    # Kept, as looking up a place in a short shuffled order takes long.
    if self._opened is None or self._opened[0] != self._part:
      self._opened = self._part, self._parts[self._part]
    return self._opened[1]

  def _read(self) -> Block:
    """Reads the current block and shuffles its records."""
    block = read_block(
      self._current_part(), self._record, self._byte, self._window
    )
    rng = np.random.default_rng([self._seed, self._part, self._record])
    order = rng.permutation(len(block.records))
    return dataclasses.replace(block, records=[block.records[i] for i in order])

  def _advance(self, block: Block) -> None:
    """Goes from a block to the next one, in this part or the lane's next."""
    record, byte = block.next_record, block.next_byte
    if record >= self._current_part().stop:
      self._part, record, byte = self._part + self._num_lanes, 0, 0
    self._record, self._byte, self._taken, self._block = record, byte, 0, None


class RecordSource:
  """A `documents.Source` of TFRecord files, which are read front to back.

  Lane i of n reads the parts i, i + n, ... of an endless order. A part is a
  file. If there are fewer files than lanes, each file is cut into c = ceil(n /
  files) parts; a part has every c-th record, and its lane skips the others.
  The lanes together shuffle `window` documents at a time.
  """

  def __init__(
    self,
    files: list[Part],
    parse: Callable[[bytes], str],
    window: int,
    num_bytes: int,
  ):
    self._files, self._parse, self._window = files, parse, window
    self.num_documents = sum(file.stop - file.first for file in files)
    self.num_bytes = num_bytes

  def documents(self) -> Iterator[str]:
    """Yields every document once, in order."""
    for file in self._files:
      for block in blocks(file):
        for record in block.records:
          yield parsed(file, self._parse, record)

  def lanes(
    self, lanes: Sequence[int], num_lanes: int, seed: int
  ) -> list[RecordLane]:
    """Returns an endless iterator of documents for each of lanes."""
    cuts = math.ceil(num_lanes / len(self._files))
    parts = [
      dataclasses.replace(file, first=file.first + cut, stride=cuts)
      for cut in range(cuts)
      for file in self._files
    ]
    order: Any = grain.MapDataset.source(parts).seed(seed).shuffle()
    order = order.repeat()
    window = math.ceil(self._window / num_lanes)
    return [
      RecordLane(order, lane, num_lanes, seed, window, self._parse)
      for lane in lanes
    ]
