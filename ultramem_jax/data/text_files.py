"""Local text files as documents with random access.

A file is one document; a `.jsonl` file holds one per line. Either may be
compressed (`.gz`, `.zst`). Nothing is kept in memory: a document is a place
(file, offset, length), read when asked for. Compressed files are unpacked
once, while indexing, into one unnamed temporary file of the process, in
`TMPDIR`, which needs room for the unpacked text.

Every line of JSON is parsed while indexing, so that a damaged line stops a
run before it trains; that costs about three seconds per gigabyte.
"""

import functools
import glob
import gzip
import hashlib
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
  """A file, and its name below the corpus, which decides its split."""

  path: str
  name: str

  @property
  def packing(self) -> str:
    """The suffix of its compression, or ""."""
    suffix = os.path.splitext(self.path)[1]
    return suffix if suffix in (".gz", ".zst") else ""

  @property
  def has_lines(self) -> bool:
    """Whether each line is a document of its own."""
    return self.path.removesuffix(self.packing).endswith(".jsonl")


def find(pattern: str, field: str) -> list[TextFile]:
  """The files that a glob matches, ordered by name.

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
  """TextFiles of paths, named relative to root and ordered by name."""
  names = ((p, os.path.relpath(p, root).replace(os.sep, "/")) for p in paths)
  return sorted((TextFile(*n) for n in names), key=lambda file: file.name)


class TextDocuments:
  """The non-empty documents of files, a sequence of str.

  `place_D4` holds for each document: file, line (from 1; 0 = whole file),
  offset and length in bytes, of the unpacked text.
  """

  def __init__(
    self, files: list[TextFile], place_D4: np.ndarray, text_field: str
  ):
    self._files, self._text_field = files, text_field
    self._place_D4 = place_D4

  def __len__(self) -> int:
    return len(self._place_D4)

  def __repr__(self) -> str:
    return f"TextDocuments({len(self)} in {len(self._files)} files)"

  def __getitem__(self, index: int) -> str:
    number, line, _, _ = map(int, self._place_D4[index])
    data = self._bytes(index)
    if line:
      return _parse(data, self._files[number], line, self._text_field)
    return data.decode(errors="replace")

  def _bytes(self, index: int) -> bytes:
    """A document as it is stored, unpacked."""
    number, _, offset, length = map(int, self._place_D4[index])
    file = self._files[number]
    if file.packing:
      data = os.pread(_unpacked().fileno(), length, offset)
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
    return int(self._place_D4[:, 3].sum())

  def held_out(self, fraction: float) -> np.ndarray:
    """Whether each document falls into validation: a hash of its name."""
    limit = fraction * 2**64
    names = (
      f"{self._files[number].name}:{line}" if line else self._files[number].name
      for number, line in self._place_D4[:, :2]
    )
    return np.array([_hash(name) < limit for name in names], bool)

  def subset(self, mask_D: np.ndarray) -> "TextDocuments":
    """The documents where mask is True."""
    return TextDocuments(self._files, self._place_D4[mask_D], self._text_field)

  def cut(self, limit: int) -> "TextDocuments":
    """Whole files of more than limit bytes cut into documents of their own.

    At the last end of a line that fits, or, where a line is longer than
    limit, between two characters. Lines of .jsonl are left whole.
    """
    places = []
    for index, place in enumerate(self._place_D4.tolist()):
      number, line, offset, length = place
      if line or length <= limit:
        places.append(place)
        continue
      ends = [*_piece_ends(self._bytes(index), limit), length]
      for start, end in itertools.pairwise([0, *ends]):
        places.append([number, line, offset + start, end - start])
    return TextDocuments(
      self._files, np.array(places, np.int64), self._text_field
    )


def _piece_ends(data: bytes, limit: int) -> Iterator[int]:
  """Where to cut data into pieces of 1 to limit bytes; not its own end."""
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
    field: the setting to name in errors.
    value: its value.
  Returns:
    The documents, in order of files, then of lines.
  Raises:
    ConfigError: a file that cannot be read or unpacked, a damaged line, a
      line without text_field.
  """
  places = [np.zeros((0, 4), np.int64)]
  for number, file in enumerate(files):
    try:
      stat = os.stat(file.path)
      place_D3 = _scan(file, text_field, stat.st_size, stat.st_mtime_ns)
    except ConfigError:
      raise
    except (OSError, ValueError) as error:
      raise ConfigError(f"{field} = {value!r}: {error}") from error
    places.append(np.insert(place_D3, 0, number, axis=1))
  return TextDocuments(files, np.concatenate(places), text_field)


@functools.cache  # both splits of a run, and its description, need the same
def _scan(
  file: TextFile, text_field: str, size: int, mtime_ns: int
) -> np.ndarray:
  """The (line, offset, length) of each document of one file."""
  del mtime_ns  # part of the key: a file that changes is scanned again
  if not os.access(file.path, os.R_OK):
    raise ValueError(f"{file.path}: may not be read")
  offset = 0
  if file.packing:
    offset, size = _unpack(file)
  if not file.has_lines:
    places = [(0, offset, size)] if size else []
  elif file.packing:
    places = _scan_lines(_unpacked(), offset, file, text_field)
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
  """The (line, offset, length) of the lines from offset that hold text."""
  places = []
  stream.seek(offset)
  for line, data in enumerate(stream, 1):
    if data.strip() and _parse(data, file, line, text_field):
      places.append((line, offset, len(data)))
    offset += len(data)
  return places


def _parse(data: bytes, file: TextFile, line: int, text_field: str) -> str:
  """The text of one line of JSON."""
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


@functools.cache
def _unpacked() -> BinaryIO:
  """The temporary file that holds what compressed files unpack to."""
  return tempfile.TemporaryFile()


def _unpack(file: TextFile) -> tuple[int, int]:
  """Appends a file's contents to the temporary file; (offset, length)."""
  target = _unpacked()
  start = target.seek(0, os.SEEK_END)
  chunks = _gzip_chunks if file.packing == ".gz" else _zstd_chunks
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
  """A 64-bit number that depends on name alone, on every machine."""
  data = name.encode(errors="surrogateescape")
  digest = hashlib.blake2b(data, digest_size=8).digest()
  return int.from_bytes(digest, "big")
