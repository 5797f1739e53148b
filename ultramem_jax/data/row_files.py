"""Parquet files and Arrow streams: documents row by row."""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from ultramem_jax.data import formats
from ultramem_jax.data.forms import Form
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import first_line

# Rows held in memory at once.
_BATCH_ROWS = 1024

# The end of every whole stream of Arrow.
_END = b"\xff\xff\xff\xff\0\0\0\0"

_Batches = Callable[[list[str]], Iterator[pa.RecordBatch]]


def rows(path: str, form: Form) -> Iterator[bytes]:
  """Yields what each row holds: its text in UTF-8, or a record.

  Args:
    path: of the file.
    form: which columns hold documents. If they may be examples, each row
      becomes a line of JSON, otherwise the text alone.
  Raises:
    ConfigError: there are no such columns, or the text is not a string.
    ValueError: the file is damaged.
  """
  try:
    with _opened(path) as (schema, batches):
      columns = form.fields(schema.names, path)
      if len(columns) == 1 and columns[0] != "messages":
        _require_strings(schema, path, columns[0])
      row = 0
      for batch in batches(columns):
        if form.has_answers:
          lines = map(_present, batch.to_pylist())
          # What JSON cannot say is not text: the reader of the line names it.
          yield from (
            json.dumps(line, default=lambda _: None).encode() for line in lines
          )
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
    cause = first_line(error)
    name = "Parquet" if _is_parquet(path) else "Arrow"
    raise ValueError(f"{path}: is not a whole {name} file ({cause})") from error
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{path}: holds text that is not UTF-8 ({error})"
    ) from error


def _is_parquet(path: str) -> bool:
  return formats.named(path).kind == "parquet"


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[pa.Schema, _Batches]]:
  """Opens a file: its schema, and what reads batches of some columns."""
  if _is_parquet(path):
    with parquet.ParquetFile(path, page_checksum_verification=True) as file:
      yield (
        file.schema_arrow,
        lambda columns: file.iter_batches(_BATCH_ROWS, columns=columns),
      )
    return
  # A stream that was cut between two batches would end without an error.
  with open(path, "rb") as file:
    file.seek(-min(len(_END), os.path.getsize(path)), os.SEEK_END)
    if file.read() != _END:
      raise pa.ArrowInvalid("it ends too early")
  with pa.memory_map(path) as mapped, pa.ipc.open_stream(mapped) as reader:
    yield (
      reader.schema,
      lambda columns: (
        batch.select(columns).slice(start, _BATCH_ROWS)
        for batch in reader
        for start in range(0, batch.num_rows, _BATCH_ROWS)
      ),
    )


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
