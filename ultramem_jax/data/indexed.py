"""Documents with random access, and endless shuffled lanes of them."""

from collections.abc import Iterator, Sequence
from typing import Any

import grain


class IndexedLane:
  """The documents lane, lane + num_lanes, ... of an endless order."""

  def __init__(self, order: grain.MapDataset, lane: int, num_lanes: int):
    self._order, self._next, self._num_lanes = order, lane, num_lanes

  def __next__(self) -> str:
    text = self._order[self._next]
    self._next += self._num_lanes
    return text

  def get_state(self) -> int:
    return self._next

  def set_state(self, state: int) -> None:
    self._next = state


class IndexedSource:
  """Documents with random access, shuffled over the whole corpus."""

  def __init__(self, sequence: Sequence[str], num_bytes: int):
    self._sequence = sequence
    self.num_documents = len(sequence)
    self.num_bytes = num_bytes

  def documents(self) -> Iterator[str]:
    """Every document once, in order."""
    return (self._sequence[i] for i in range(self.num_documents))

  def lanes(self, lanes: Sequence[int], num_lanes: int, seed: int) -> list[Any]:
    """Endless document iterators, one for each of lanes.

    Lane i of n yields the documents i, i + n, ... of an order that is
    shuffled anew every epoch, so that together the n lanes read each
    document once an epoch.
    """
    order = grain.MapDataset.source(self._sequence).seed(seed).shuffle()
    order = order.repeat()
    return [IndexedLane(order, lane, num_lanes) for lane in lanes]
