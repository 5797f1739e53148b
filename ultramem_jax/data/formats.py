"""What a file holds: by the end of its name, and by its first bytes.

A name and its file must agree, so that no run trains on the bytes of an archive
or a picture. Nothing is guessed: a compressed file has the suffix of its
compression, `.txt` or no known suffix is text in UTF-8.
"""

import os
import re
from typing import NamedTuple

# The longest signature ends here.
HEAD_BYTES = 512

COMPRESSIONS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_KINDS = {
  ".jsonl": "lines",
  ".ndjson": "lines",
  ".jsonlines": "lines",
  ".json": "json",
  ".parquet": "parquet",
  ".arrow": "arrow",
}

# Files of rows, and what their signatures are called.
ROWS = {"parquet": "Parquet", "arrow": "streamed Arrow"}

# Names of formats, and what their files begin with.
_SIGNATURES = {
  "gzip": rb"\x1f\x8b",
  "zstd": rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18",
  "bzip2": rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)",
  "xz": rb"\xfd7zXZ\0",
  "Parquet": rb"PAR1\x15",
  "streamed Arrow": rb"\xff\xff\xff\xff.{3}\0",
  "Unix compress": rb"\x1f[\x9d\xa0]",
  "lz4": rb"[\x02\x04]\x22\x4d\x18",
  "lzip": rb"LZIP\x01",
  "lzma": rb"\x5d\0\0",
  "snappy": rb"\xff\x06\0\0sNaPpY",
  "zip": rb"PK(?:\x03\x04|\x05\x06|\x07\x08)",
  "7z": rb"7z\xbc\xaf\x27\x1c",
  "rar": rb"Rar!\x1a\x07",
  "tar": rb".{257}ustar",
  "PDF": rb"%PDF-\d",
  "PNG": rb"\x89PNG",
  "JPEG": rb"\xff\xd8\xff",
  "GIF": rb"GIF8[79]a.[\0-\x08]",
  "TIFF": rb"II\*\0|MM\0\*",
  "RIFF": rb"RIFF.{4}(?:WAVE|WEBP|AVI )",
  "MP4": rb"\0.{3}ftyp",
  "Ogg": rb"OggS\0",
  "FLAC": rb"fLaC\0",
  "MP3": rb"ID3[\x02-\x04]",
  "Matroska": rb"\x1a\x45\xdf\xa3",
  "OLE (.doc, .xls)": rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
  "SQLite": rb"SQLite format 3\0",
  "Arrow": rb"ARROW1\0",
  "Feather": rb"FEA1\0",
  "Avro": rb"Obj\x01",
  "HDF5": rb"\x89HDF\r\n\x1a\n",
  "npy": rb"\x93NUMPY",
  "pickle": rb"\x80[\x02-\x05]",
  "GGUF": rb"GGUF[\x01-\x09]\0",
  "ELF": rb"\x7fELF",
  "UTF-32 text": rb"\xff\xfe\0\0|\0\0\xfe\xff",
  "UTF-16 text": rb"\xff\xfe|\xfe\xff",
  "a Git LFS pointer": rb"version https://git-lfs\.github\.com/spec/",
}
_PATTERNS = {
  name: re.compile(pattern, re.DOTALL) for name, pattern in _SIGNATURES.items()
}
_REMEDIES = {
  "Parquet": "name it .parquet",
  "streamed Arrow": "name it .arrow",
  "UTF-32 text": "convert it to UTF-8",
  "UTF-16 text": "convert it to UTF-8",
  "a Git LFS pointer": "fetch the file by git lfs pull",
  **{name: f"name it {suffix}" for suffix, name in COMPRESSIONS.items()},
}


class Format(NamedTuple):
  """What the name of a file says of it.

  kind: text (one document) | lines (of JSON, a document each) | json (either)
    | parquet, arrow (a document for each row).
  compression: one of COMPRESSIONS, or "".
  """

  kind: str
  compression: str


def named(path: str) -> Format:
  """Returns the format that a path names, in upper or lower case."""
  stem, suffix = os.path.splitext(path.lower())
  compression = suffix if suffix in COMPRESSIONS else ""
  if compression:
    suffix = os.path.splitext(stem)[1]
  return Format(_KINDS.get(suffix, "text"), compression)


def signature(head: bytes) -> str:
  """Returns the name of the format that begins with head; "" for text."""
  found = (name for name, p in _PATTERNS.items() if p.match(head))
  return next(found, "")


def stored(path: str) -> str:
  """Returns the signature that the file of this name must have."""
  kind, compression = named(path)
  return COMPRESSIONS.get(compression, ROWS.get(kind, ""))


def require_signature(path: str, head: bytes, expected: str) -> None:
  """Raises ValueError unless a file begins as expected.

  Args:
    path: of the file, for the error.
    head: its first HEAD_BYTES bytes, or those that it unpacks to.
    expected: what `signature` must return.
  """
  found = signature(head)
  if found == expected:
    return
  if not found:
    raise ValueError(f"{path}: is not a {expected} file, as its name says")
  remedy = _REMEDIES.get(
    found, "only text, JSON lines, Parquet and Arrow are read"
  )
  raise ValueError(f"{path}: holds {found}; {remedy}")


def is_packed(path: str) -> bool:
  """Returns whether a file must be unpacked before documents can be read."""
  kind, compression = named(path)
  return bool(compression) or kind in ROWS
