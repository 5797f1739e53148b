"""Several sources as one: a mixture of their documents."""

import bisect
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from ultramem_jax.data.documents import Document, DocumentLane, Source

# A lane walks round a circle of _CIRCLE places in equal steps; steps of the
# golden ratio spread any number of places evenly.
_CIRCLE = 1 << 64
_STEP = 0x9E3779B97F4A7C15


class MixedLane(Iterator[Document]):
  """Yields documents of several lanes, a share of them from each.

  The number of a document decides which lane it comes from. Of the first n, the
  part of a lane differs from its share by a few documents at most.

  Args:
    lanes: one of each source.
    ends: where the arc of each lane ends on the circle, ascending.
    start: the place on the circle of document 0.
  """

  def __init__(
    self, lanes: Sequence[DocumentLane], ends: Sequence[int], start: int
  ):
    self._lanes, self._ends, self._start = lanes, ends, start
    self._count = 0

  def __next__(self) -> Document:
    place = (self._start + self._count * _STEP) % _CIRCLE
    document = next(self._lanes[bisect.bisect_right(self._ends, place)])
    self._count += 1
    return document

  def get_state(self) -> dict[str, Any]:
    """Returns the number of the next document, and the state of each lane."""
    states = [lane.get_state() for lane in self._lanes]
    return {"count": self._count, "sources": states}

  def set_state(self, state: dict[str, Any]) -> None:
    """Goes to where a state was taken."""
    self._count = state["count"]
    for lane, held in zip(self._lanes, state["sources"], strict=True):
      lane.set_state(held)


class MixedSource:
  """A `documents.Source` that draws from others.

  Args:
    sources: the others.
    shares: the share of documents from each; they add up to 1.
  """

  def __init__(self, sources: Sequence[Source], shares: Sequence[float]):
    self._sources = sources
    self._ends = [
      round(end * _CIRCLE) for end in itertools.accumulate(shares[:-1])
    ]
    self.num_documents = sum(source.num_documents for source in sources)
    sizes = [source.num_bytes for source in sources]
    self.num_bytes = sum(sizes) if all(sizes) else 0

  def documents(self) -> Iterator[Document]:
    """Yields every document once, source by source."""
    for source in self._sources:
      yield from source.documents()

  def lanes(
    self, lanes: Sequence[int], num_lanes: int, seed: int
  ) -> list[MixedLane]:
    """Returns an endless iterator of documents for each of lanes.

    The lanes together read each document of a source about once in an epoch of
    that source.
    """
    parts = [source.lanes(lanes, num_lanes, seed) for source in self._sources]
    return [
      MixedLane(row, self._ends, _start(seed, lane))
      for lane, row in zip(lanes, zip(*parts, strict=True), strict=True)
    ]


def _start(seed: int, lane: int) -> int:
  found = hashlib.blake2b(f"{seed} {lane}".encode(), digest_size=8).digest()
  return int.from_bytes(found, "big")
