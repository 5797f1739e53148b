"""Parquet files: documents row by row."""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from ultramem_jax.data.forms import Form
from ultramem_jax.settings.checks import require

# Rows held in memory at once.
_BATCH_ROWS = 1024


def rows(path: str, form: Form) -> Iterator[bytes]:
  """Yields what each row holds: its text in UTF-8, or a record.

  Args:
    path: of the file.
    form: which columns hold documents. If they may be examples, each row
      becomes a line of JSON, otherwise the text alone.
  Raises:
    ConfigError: there are no such columns, or the text is no string.
    ValueError: the file is damaged.
  """
  try:
    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
      schema = file.schema_arrow
      columns = form.fields(schema.names, path)
      if len(columns) == 1 and columns[0] != "messages":
        _require_strings(schema, path, columns[0])
      row = 0
      for batch in file.iter_batches(_BATCH_ROWS, columns=columns):
        if form.has_answers:
          lines = map(_present, batch.to_pylist())
          yield from (json.dumps(line).encode() for line in lines)
          continue
        for value in batch.column(0).cast(pa.large_binary()).to_pylist():
          row += 1
          require(
            value is not None,
            "data.text_field",
            columns[0],
            f"is null in {path}, row {row}",
          )
          yield value
  except (pa.ArrowException, OSError) as error:
    cause = str(error).splitlines()[0]
    raise ValueError(
      f"{path}: is not a whole Parquet file ({cause})"
    ) from error


def _present(value: Any) -> Any:
  """Returns a value without the fields of structs in it that are null."""
  if isinstance(value, list):
    return [_present(each) for each in value]
  if isinstance(value, dict):
    return {k: _present(v) for k, v in value.items() if v is not None}
  return value


def _require_strings(schema: pa.Schema, path: str, text_field: str) -> None:
  """Raises ConfigError unless a column holds strings."""
  kind = schema.field(text_field).type
  if pa.types.is_dictionary(kind):
    kind = kind.value_type
  require(
    pa.types.is_string(kind)
    or pa.types.is_large_string(kind)
    or pa.types.is_string_view(kind),
    "data.text_field",
    text_field,
    f"is of type {kind} in {path}, not a string",
  )
