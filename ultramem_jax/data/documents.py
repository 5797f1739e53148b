"""What every source of documents offers."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol


class Example(NamedTuple):
  """A text of which only the answers are learned.

  text: prompts and answers.
  answers: where each answer lies in text, (start, stop) in characters.
  num_bytes: the size of the answers in UTF-8.
  is_chat: a chat template wrote the text. It names special tokens, those that
    begin and end it among them.
  """

  text: str
  answers: tuple[tuple[int, int], ...]
  num_bytes: int
  is_chat: bool


# A text that is learned as a whole, or an Example.
Document = str | Example


def text_of(document: Document) -> str:
  """Returns all text of a document."""
  return document if isinstance(document, str) else document.text


def content_of(document: Document) -> bytes:
  """Returns bytes that differ between any two documents that differ."""
  if isinstance(document, str):
    return document.encode()
  return f"{document.answers}\n{document.text}".encode()


class DocumentLane(Iterator[Document], Protocol):
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

  def documents(self) -> Iterator[Document]:
    """Yields every document once, in order."""
    ...

  def lanes(
    self, lanes: Sequence[int], num_lanes: int, seed: int
  ) -> Sequence[DocumentLane]:
    """Returns an endless, shuffled iterator for each of lanes.

    The lanes 0 to num_lanes - 1 together read each document once an epoch.
    """
    ...
