"""Lines of JSON, each an object with a field that holds a text."""

import json
import re

from ultramem_jax.settings.checks import require


def parse(data: bytes, where: str, text_field: str) -> str:
  """Returns the text of one line.

  Args:
    data: the line.
    where: its file and number, for errors.
    text_field: the field that holds the text.
  Raises:
    ConfigError: it has no such field, or one that is no string.
    ValueError: it is not an object of JSON.
  """
  try:
    fields = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: is not JSON ({error})") from error
  if not isinstance(fields, dict):
    raise ValueError(f"{where}: is not an object with fields")
  require(
    text_field in fields,
    "data.text_field",
    text_field,
    f"is not in {where}; fields there: {', '.join(fields)}",
  )
  text = fields[text_field]
  require(
    isinstance(text, str),
    "data.text_field",
    text_field,
    f"is not a string in {where}",
  )
  # JSON can escape half of a surrogate pair, which no encoding accepts.
  return text.encode(errors="replace").decode()


def begins(line: bytes, text_field: str) -> bool:
  """Returns whether the first line of a .json file makes its lines documents.

  Published corpora call such files .json. Other .json files are text.
  """
  try:
    fields = json.loads(line)
  except (ValueError, RecursionError):
    return False
  return isinstance(fields, dict) and text_field in fields


def begins_array(head: bytes, text_field: str) -> bool:
  """Returns whether a .json file begins like an array of documents."""
  is_array = re.match(rb"\s*\[\s*\{", head) is not None
  return is_array and json.dumps(text_field).encode() in head
