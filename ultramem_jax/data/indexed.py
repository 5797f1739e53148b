"""Documents with random access, and endless shuffled lanes of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain

from ultramem_jax.data.documents import Document


class IndexedLane(Iterator[Document]):
  """Yields the documents lane, lane + num_lanes, ... of an endless order."""

  def __init__(self, order: Sequence[Document], lane: int, num_lanes: int):
    self._order, self._next, self._num_lanes = order, lane, num_lanes

  def __next__(self) -> Document:
    document = self._order[self._next]
    self._next += self._num_lanes
    return document

  def get_state(self) -> int:
    """Returns the place of the next document in the order."""
    return self._next

  def set_state(self, state: int) -> None:
    """Goes to where a state was taken."""
    self._next = state


class IndexedSource:
  """A `documents.Source` with random access, shuffled over the whole corpus.

  Args:
    sequence: the documents, by `len` and `[]`.
    num_documents, num_bytes: as in `documents.Source`.
  """

  def __init__(
    self,
    sequence: grain.sources.RandomAccessDataSource[Document],
    num_documents: int,
    num_bytes: int,
  ):
    self._sequence = sequence
    self.num_documents, self.num_bytes = num_documents, num_bytes

  def documents(self) -> Iterator[Document]:
    """Yields every document once, in order."""
    return (self._sequence[i] for i in range(len(self._sequence)))

  def lanes(
    self, lanes: Sequence[int], num_lanes: int, seed: int
  ) -> list[IndexedLane]:
    """Returns an endless iterator of documents for each of lanes.

    Lane i of n yields the documents i, i + n, ... of an order that is
    shuffled anew every epoch, so that together the n lanes read each
    document once an epoch.
    """
    order: Any = grain.MapDataset.source(self._sequence).seed(seed).shuffle()
    order = order.repeat()
    return [IndexedLane(order, lane, num_lanes) for lane in lanes]
