"""What every source of documents offers; a document is a str."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol


class DocumentLane(Iterator[str], Protocol):
  """An endless iterator of documents that can be resumed."""

  def get_state(self) -> Any:
    """Returns the place of the next document, fit for JSON."""

  def set_state(self, state: Any) -> None:
    """Goes to where a state was taken."""


class Source(Protocol):
  """The documents of one split.

  num_documents, num_bytes: as they are stored, before long files are cut;
    num_bytes is 0 where the size is unknown.
  """

  num_documents: int
  num_bytes: int

  def documents(self) -> Iterator[str]:
    """Yields every document once, in order."""
    ...

  def lanes(
    self, lanes: Sequence[int], num_lanes: int, seed: int
  ) -> Sequence[DocumentLane]:
    """Returns an endless, shuffled iterator for each of lanes.

    The lanes 0 to num_lanes - 1 together read each document once an epoch.
    """
    ...
