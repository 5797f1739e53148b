"""The errors that a user can mend; a command reports each in one line."""

from collections.abc import Sequence

LONGEST = 200  # characters of a line of another library
FEW = 3  # names in a message


class UserError(Exception):
  """Something that the user can mend; the message says how."""


class ConfigError(UserError, ValueError):
  """A bad setting; the message names field, value and what is allowed."""


class CheckpointError(UserError, RuntimeError):
  """A checkpoint cannot be read or written, or another process uses it."""


class TargetError(UserError, ValueError):
  """A checkpoint is intact, but does not hold the arrays asked for."""


class TrainingError(UserError, RuntimeError):
  """A run cannot go on, for example because its loss is not finite."""


class DataError(UserError, ValueError):
  """A file of data is damaged or cut off, or was changed while in use."""


def few(texts: Sequence[str], separator: str = ", ", most: int = FEW) -> str:
  """Joins the first texts, and says how many there are if these are not all."""
  rest = len(texts) - most
  more = [f"... ({len(texts)} in all)"] * (rest > 0)
  return separator.join([*texts[:most], *more])


def first_line(error: BaseException) -> str:
  """Returns the first line of an error, cut; its type if it has no text."""
  text = str(error).strip() or type(error).__name__
  return text.splitlines()[0][:LONGEST]
