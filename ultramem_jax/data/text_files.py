"""Local text files as documents with random access.

A file is one document; a `.jsonl` file holds one per line. Either may be
compressed (`.gz`, `.zst`). Nothing is kept in memory: a document is a place
(file, offset, length), read when asked for. Compressed files are unpacked
once, while indexing, into an unnamed temporary file in `TMPDIR`, which needs
room for the unpacked text.

Every line of JSON is parsed while indexing, so that a damaged line stops a
run before it trains; that costs about three seconds per gigabyte.
"""

import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError

_CHUNK_BYTES = 1 << 20

# Every lane holds its current document in memory, tokens and all.
_MAX_DOCUMENT_BYTES = 64 << 20


class TextFile(NamedTuple):
  """A file: its path, and its name within the corpus.

  The name decides into which split the file falls.
  """

  path: str
  name: str

  @property
  def compression(self) -> str:
    """The suffix of the compression, or ""."""
    suffix = os.path.splitext(self.path)[1]
    return suffix if suffix in (".gz", ".zst") else ""

  @property
  def has_lines(self) -> bool:
    """Whether each line is a document of its own."""
    return self.path.removesuffix(self.compression).endswith(".jsonl")


def find(pattern: str, field: str) -> list[TextFile]:
  """Finds the files that a glob matches, ordered by name.

  Args:
    pattern: a path, `~` and the wildcards `* ? [] **` allowed.
    field: the setting that holds the pattern, for the error.
  Returns:
    The files; a name is the path below the part without wildcards.
  Raises:
    ConfigError: no file matches.
  """
  full = os.path.expanduser(pattern)
  paths = [p for p in glob.glob(full, recursive=True) if os.path.isfile(p)]
  require(bool(paths), field, pattern, "matches no file")
  root = os.path.dirname(full)
  while glob.has_magic(root):
    root = os.path.dirname(root)
  return listed(paths, root or ".")


def listed(paths: Iterable[str], root: str) -> list[TextFile]:
  """Returns paths as TextFiles, named relative to root and ordered by name."""
  names = ((p, os.path.relpath(p, root).replace(os.sep, "/")) for p in paths)
  return sorted((TextFile(*n) for n in names), key=lambda file: file.name)


class TextDocuments:
  """The non-empty documents of files, a sequence of str; made by `index`.

  Args:
    files: where the documents lie.
    unpacked: the contents of the compressed files among them.
    places: [documents, 4] int64: the number of the file, the line
      (from 1; 0 = the whole file), and offset and length in bytes, in the file
      or in unpacked.
    text_field: the field of a JSON line that holds the text.
  """

  def __init__(
    self,
    files: list[TextFile],
    unpacked: BinaryIO,
    places: np.ndarray,
    text_field: str,
  ):
    self._files, self._unpacked = files, unpacked
    self._places, self._text_field = places, text_field

  def __len__(self) -> int:
    return len(self._places)

  def __repr__(self) -> str:
    return f"TextDocuments({len(self)} in {len(self._files)} files)"

  def __getitem__(self, index: int) -> str:
    number, line, _, _ = map(int, self._places[index])
    data = self._bytes(index)
    if line:
      return _parse(data, self._files[number], line, self._text_field)
    return data.decode(errors="replace")

  def _bytes(self, index: int) -> bytes:
    """Returns a document as it is stored, unpacked."""
    number, _, offset, length = map(int, self._places[index])
    file = self._files[number]
    if file.compression:
      data = os.pread(self._unpacked.fileno(), length, offset)
    else:
      # Opened anew each time: a corpus may have more files than a process
      # may hold open.
      with open(file.path, "rb", buffering=0) as stream:
        data = os.pread(stream.fileno(), length, offset)
    if len(data) < length:
      raise ValueError(f"{file.path}: was cut short while in use")
    return data

  @property
  def num_bytes(self) -> int:
    """The size of all documents, unpacked."""
    return int(self._places[:, 3].sum())

  def held_out(self, fraction: float) -> np.ndarray:
    """Returns for each document whether a hash of its name holds it out.

    Args:
      fraction: about this share of the documents is held out.
    """
    limit = fraction * 2**64
    names = (
      f"{self._files[number].name}:{line}" if line else self._files[number].name
      for number, line in self._places[:, :2]
    )
    return np.array([_hash(name) < limit for name in names], bool)

  def subset(self, mask: np.ndarray) -> "TextDocuments":
    """Returns the documents where the mask is True."""
    return self._at(self._places[mask])

  def cut(self, limit: int) -> "TextDocuments":
    """Cuts files of more than limit bytes into several documents each.

    A file is cut at the last end of a line that fits, or, where a line is
    longer than limit, between two characters. Lines of .jsonl stay whole.
    """
    places = []
    for index, place in enumerate(self._places.tolist()):
      number, line, offset, length = place
      if line or length <= limit:
        places.append(place)
        continue
      ends = [*_piece_ends(self._bytes(index), limit), length]
      for start, end in itertools.pairwise([0, *ends]):
        places.append([number, line, offset + start, end - start])
    return self._at(np.array(places, np.int64))

  def _at(self, places: np.ndarray) -> "TextDocuments":
    """Returns the documents at other places in the same files."""
    return TextDocuments(self._files, self._unpacked, places, self._text_field)


def _piece_ends(data: bytes, limit: int) -> Iterator[int]:
  """Yields where data is cut into pieces of 1 to limit bytes.

  The end of data is not among the places.
  """
  start = 0
  while len(data) - start > limit:
    end = data.rfind(b"\n", start, start + limit) + 1
    if end <= start:
      end = start + limit
      # Not before the second, third or fourth byte of a character.
      while end > start + 1 and data[end] & 0xC0 == 0x80:
        end -= 1
    yield end
    start = end


def index(
  files: list[TextFile], text_field: str, field: str, value: str
) -> TextDocuments:
  """Finds every document in files, leaving empty ones out.

  Args:
    files: what to index.
    text_field: the field of a JSON line that holds the text.
    field, value: the setting that names the files, and its value, for errors.
  Returns:
    The documents, in order of files, then of lines.
  Raises:
    ConfigError: a file that cannot be read or unpacked, a damaged line, a
      line without text_field.
  """
  unpacked = io.BytesIO()
  if any(file.compression for file in files):
    # It is closed with the last TextDocuments that reads it.
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115
  places = [np.zeros((0, 4), np.int64)]
  for number, file in enumerate(files):
    try:
      scanned = _scan(file, unpacked, text_field)
    except ConfigError:
      raise
    except (OSError, ValueError) as error:
      raise ConfigError(f"{field} = {value!r}: {error}") from error
    places.append(np.insert(scanned, 0, number, axis=1))
  return TextDocuments(files, unpacked, np.concatenate(places), text_field)


def _scan(file: TextFile, unpacked: BinaryIO, text_field: str) -> np.ndarray:
  """Returns line, offset and length of each document of one file."""
  offset, size = 0, os.path.getsize(file.path)
  if not os.access(file.path, os.R_OK):
    raise ValueError(f"{file.path}: may not be read")
  if file.compression:
    offset, size = _unpack(file, unpacked)
  if not file.has_lines:
    places = [(0, offset, size)] if size else []
  elif file.compression:
    places = _scan_lines(unpacked, offset, file, text_field)
  else:
    with open(file.path, "rb") as stream:
      places = _scan_lines(stream, offset, file, text_field)
  longest = max((length for _, _, length in places), default=0)
  if longest > _MAX_DOCUMENT_BYTES:
    raise ValueError(
      f"{file.path}: holds a document of {longest / 1e6:.0f} MB; at most "
      f"{_MAX_DOCUMENT_BYTES / 1e6:.0f} MB fit in a lane: split it up"
    )
  return np.array(places, np.int64).reshape(-1, 3)


def _scan_lines(
  stream: BinaryIO, offset: int, file: TextFile, text_field: str
) -> list[tuple[int, int, int]]:
  """Returns line, offset and length of the lines from offset with text."""
  places = []
  stream.seek(offset)
  for line, data in enumerate(stream, 1):
    if data.strip() and _parse(data, file, line, text_field):
      places.append((line, offset, len(data)))
    offset += len(data)
  return places


def _parse(data: bytes, file: TextFile, line: int, text_field: str) -> str:
  """Returns the text of one line of JSON."""
  where = f"{file.path}, line {line}"
  try:
    fields = json.loads(data)
  except ValueError as error:
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


def _unpack(file: TextFile, target: BinaryIO) -> tuple[int, int]:
  """Appends a file's contents to target; returns their offset and length."""
  start = target.seek(0, os.SEEK_END)
  chunks = _gzip_chunks if file.compression == ".gz" else _zstd_chunks
  with open(file.path, "rb") as packed:
    for chunk in chunks(packed, file.path):
      target.write(chunk)
  target.flush()
  return start, target.tell() - start


def _gzip_chunks(packed: BinaryIO, path: str) -> Iterator[bytes]:
  try:
    with gzip.open(packed) as stream:
      yield from iter(lambda: stream.read(_CHUNK_BYTES), b"")
  except (EOFError, gzip.BadGzipFile, zlib.error) as error:
    raise ValueError(f"{path}: is not a whole gzip file ({error})") from error


def _zstd_chunks(packed: BinaryIO, path: str) -> Iterator[bytes]:
  import zstandard  # here, as only .zst files need it

  frame = None
  for data in iter(lambda: packed.read(_CHUNK_BYTES), b""):
    while data:
      if frame is None:
        frame = zstandard.ZstdDecompressor().decompressobj()
      try:
        yield frame.decompress(data)
      except zstandard.ZstdError as error:
        raise ValueError(f"{path}: is not a zstd file ({error})") from error
      data = frame.unused_data if frame.eof else b""
      frame = None if frame.eof else frame
  # The library ends silently where a file was cut; we do not.
  if frame is not None:
    raise ValueError(f"{path}: is not a whole zstd file (it ends too early)")


def _hash(name: str) -> int:
  """Returns the 64-bit hash of a name, the same on every machine."""
  data = name.encode(errors="surrogateescape")
  digest = hashlib.blake2b(data, digest_size=8).digest()
  return int.from_bytes(digest, "big")
