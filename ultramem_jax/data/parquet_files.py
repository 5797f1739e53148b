"""Parquet files: the texts of a column, row by row."""

from collections.abc import Iterator

import pyarrow as pa
from pyarrow import parquet

from ultramem_jax.settings.checks import require

# Rows held in memory at once.
_BATCH_ROWS = 1024


def texts(path: str, text_field: str) -> Iterator[bytes]:
  """Yields the text of each row, in UTF-8.

  Args:
    path: of the file.
    text_field: the column that holds the text.
  Raises:
    ConfigError: there is no such column, or it does not hold strings.
    ValueError: the file is damaged.
  """
  try:
    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
      _require_strings(file.schema_arrow, path, text_field)
      row = 0
      for batch in file.iter_batches(_BATCH_ROWS, columns=[text_field]):
        for value in batch.column(0).cast(pa.large_binary()).to_pylist():
          row += 1
          require(
            value is not None,
            "data.text_field",
            text_field,
            f"is null in {path}, row {row}",
          )
          yield value
  except (pa.ArrowException, OSError) as error:
    cause = str(error).splitlines()[0]
    raise ValueError(
      f"{path}: is not a whole Parquet file ({cause})"
    ) from error


def _require_strings(schema: pa.Schema, path: str, text_field: str) -> None:
  """Raises ConfigError unless a schema has a column of strings."""
  require(
    schema.names.count(text_field) == 1,
    "data.text_field",
    text_field,
    f"is not in {path}; columns there: {', '.join(schema.names)}",
  )
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
