"""Finds the documents of text files, and refuses files that hold no text.

Every file is read: a damaged line, or bytes that are not text, stop a run
before it trains. That costs a few seconds per gigabyte, once (`index_cache`).
Compressed files, and rows of tables, are unpacked into an unnamed temporary
file in `TMPDIR`, which needs room for the unpacked text.
"""

import codecs
import hashlib
import io
import os
import tempfile
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from ultramem_jax.data import formats, json_lines, unpack
from ultramem_jax.data.documents import content_of
from ultramem_jax.data.find import TextFile
from ultramem_jax.data.forms import Form
from ultramem_jax.data.index_cache import IndexCache, Scan
from ultramem_jax.data.text_files import OFFSET, TextDocuments, digest
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError, DataError

# Every lane holds its current document in memory, tokens and all.
MAX_DOCUMENT_BYTES = 64 << 20

# If more than one byte in this many is not UTF-8, the encoding is another.
_DECODABLE_PER_LOST = 100
_MAY_BE_LOST = 3  # of a short file

_BOM = codecs.BOM_UTF8

Place = tuple[int, int, int, int]


def index(
  files: list[TextFile], form: Form, field: str, value: str, cache: IndexCache
) -> TextDocuments:
  """Finds every document in files, leaving empty ones out.

  Args:
    files: what to index.
    form: how lines of JSON and rows hold documents.
    field, value: the setting that names the files, and its value, for errors.
    cache: what is known of files; those that it knows are not read again,
      but unpacked.
  Returns:
    The documents, in order of files, then of lines.
  Raises:
    ConfigError: a file that cannot be read or unpacked or that holds no text, a
      damaged line, a record of another form; or all files are empty.
  """
  unpacked = io.BytesIO()
  if any(formats.is_packed(file.path) for file in files):
    # It is closed with the last TextDocuments that reads it.
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115
  places, undecodable = [np.zeros((0, 5), np.int64)], 0
  for number, file in enumerate(files):
    try:
      key = cache.key(file.path, form.key)
      known = cache.get(key)
      start, scan = _scan(file.path, unpacked, form, known)
      cache.put(key, scan)
    except ConfigError:
      raise
    except (OSError, ValueError) as error:
      raise ConfigError(f"{field} = {value!r}: {error}") from error
    found = np.insert(scan.places, 0, number, axis=1)
    found[:, OFFSET] += start
    places.append(found)
    undecodable += scan.undecodable
  require(
    sum(map(len, places)) > 0,
    field,
    value,
    f"holds no text: the {len(files)} files there are empty",
  )
  return TextDocuments(
    files, unpacked, np.concatenate(places), form, undecodable
  )


def _scan(
  path: str, unpacked: BinaryIO, form: Form, known: Scan | None
) -> tuple[int, Scan]:
  """Finds the documents of one file, and unpacks it.

  Returns:
    (start, scan): where its contents begin, in the file or in unpacked.
  """
  kind, compression = formats.named(path)
  with open(path, "rb") as stored:
    head, size = stored.read(formats.HEAD_BYTES), os.path.getsize(path)
    if size or formats.is_packed(path):
      formats.require_signature(path, head, formats.stored(path))
    start = unpacked.seek(0, os.SEEK_END)
    if kind in formats.ROWS:
      scan = _scan_rows(path, unpacked, form, known)
    elif compression:
      unpacked.writelines(unpack.chunks(path, compression))
      unpacked.flush()
      size = unpacked.tell() - start
      scan = known or _scan_stream(path, unpacked, start, size, form)
    else:
      start = 0
      scan = known or _scan_stream(path, stored, start, size, form)
  return start, scan


def _scan_stream(
  path: str, stream: BinaryIO, start: int, size: int, form: Form
) -> Scan:
  """Finds the documents of the last size bytes of a stream, from start."""
  stream.seek(start)
  head = stream.read(formats.HEAD_BYTES)
  if size:
    formats.require_signature(path, head, "")
  stream.seek(start)
  kind = formats.named(path).kind
  if kind == "json":
    if json_lines.begins_array(head, form):
      raise ValueError(f"{path}: is one array; write a line for each document")
    # The second is enough: the first may be damaged, which is reported later.
    lines = [stream.readline(MAX_DOCUMENT_BYTES) for _ in range(2)]
    is_lines = any(json_lines.is_document(line, form) for line in lines)
    kind = "lines" if is_lines else "text"
    stream.seek(start)
  if kind == "lines":
    return _scan_lines(path, stream, form)
  offset = len(_BOM) if head.startswith(_BOM) else 0
  size -= offset
  found, undecodable = _scan_text(
    path, _read_chunks(path, stream, start + offset, size), size
  )
  return _scanned([(0, offset, size, found)] if size else [], undecodable)


def _scanned(places: list[Place], undecodable: int) -> Scan:
  return Scan(np.array(places, np.int64).reshape(-1, 4), undecodable)


def _read_chunks(
  path: str, stream: BinaryIO, start: int, size: int
) -> Iterator[bytes]:
  """Yields size bytes of a stream."""
  stream.seek(start)
  while size:
    chunk = stream.read(min(size, unpack.CHUNK_BYTES))
    if not chunk:
      raise DataError(f"{path}: was cut short while in use")
    size -= len(chunk)
    yield chunk


def _scan_text(
  path: str, chunks: Iterable[bytes], size: int
) -> tuple[int, int]:
  """Returns the digest of a text, and how many of its bytes are not UTF-8.

  Raises:
    ValueError: they are many, or there are NUL bytes.
  """
  found = hashlib.blake2b(digest_size=8)
  decoder = codecs.getincrementaldecoder("utf-8")("ignore")
  lost = 0
  for chunk in chunks:
    if b"\0" in chunk:
      raise ValueError(
        f"{path}: holds NUL bytes, so it is not text in UTF-8; only text, "
        "JSON lines, Parquet and Arrow are read"
      )
    found.update(chunk)
    if not chunk.isascii() or decoder.getstate()[0]:
      # A character across two chunks is lost in one, and found in the next.
      lost += len(chunk) - len(decoder.decode(chunk).encode())
  if lost > max(_MAY_BE_LOST, size // _DECODABLE_PER_LOST):
    raise ValueError(
      f"{path}: {lost} of its {size} bytes are not UTF-8; convert it"
    )
  return int.from_bytes(found.digest(), "big", signed=True), lost


def _scan_lines(path: str, stream: BinaryIO, form: Form) -> Scan:
  """Finds the lines with text, to the end of a stream."""
  places, offset = [], 0
  for line, data in enumerate(stream, 1):
    if data.strip():
      document = json_lines.parse(data, f"{path}, line {line}", form)
      if document:
        _require_short(path, len(data))
        found = digest(content_of(document))
        places.append((line, offset, len(data), found))
    offset += len(data)
  return _scanned(places, 0)


def _scan_rows(
  path: str, unpacked: BinaryIO, form: Form, known: Scan | None
) -> Scan:
  """Finds the rows with text, and writes them to unpacked."""
  from ultramem_jax.data import row_files  # a tenth of a second

  places, undecodable, offset = [], 0, 0
  for row, data in enumerate(row_files.rows(path, form), 1):
    where, content = f"{path}, row {row}", data
    if form.has_answers:
      content = content_of(json_lines.parse(data, where, form))
    if content and not known:
      found, lost = _scan_text(where, [content], len(content))
      places.append((row, offset, len(data), found))
      undecodable += lost
    unpacked.write(data)
    offset += len(data)
  unpacked.flush()
  return known or _scanned(places, undecodable)


def _require_short(path: str, size: int) -> None:
  """Raises ValueError if a document that cannot be cut fills the memory."""
  if size > MAX_DOCUMENT_BYTES:
    raise ValueError(
      f"{path}: holds a document of {size / 1e6:.0f} MB; at most "
      f"{MAX_DOCUMENT_BYTES / 1e6:.0f} MB fit in one document: split it up"
    )
