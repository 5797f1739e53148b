"""Lines of JSON, each an object that holds a document."""

import json
import re

from ultramem_jax.data.documents import Document
from ultramem_jax.data.forms import Form


def parse(data: bytes, where: str, form: Form) -> Document:
  """Returns the document of one line.

  Args:
    data: the line.
    where: its file and number, for errors.
    form: which fields hold it.
  Raises:
    ConfigError: `Form.document` raises one.
    ValueError: it is not an object of JSON.
  """
  try:
    fields = json.loads(data)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{where}: is not JSON ({error})") from error
  if not isinstance(fields, dict):
    raise ValueError(f"{where}: is not an object with fields")
  return form.document(fields, where)


def is_document(line: bytes, form: Form) -> bool:
  """Returns whether a line of a .json file makes its lines documents.

  Published corpora call such files .json. Other .json files are text.
  """
  try:
    fields = json.loads(line)
  except (ValueError, RecursionError):
    return False
  return isinstance(fields, dict) and not fields.keys().isdisjoint(form.names)


def begins_array(head: bytes, form: Form) -> bool:
  """Returns whether a .json file begins like an array of documents."""
  is_array = re.match(rb"\s*\[\s*\{", head) is not None
  return is_array and any(json.dumps(n).encode() in head for n in form.names)
