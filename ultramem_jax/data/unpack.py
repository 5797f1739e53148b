"""Compressed files as chunks of what they hold."""

import bz2
import lzma
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from ultramem_jax.data import formats

CHUNK_BYTES = 1 << 20


def chunks(path: str, compression: str) -> Iterator[bytes]:
  """Yields the contents of a compressed file.

  A file may be several streams, one after the other, as concatenated files are;
  zeros may stand between them. The libraries would end in silence where a
  file was cut, and some of them where something else follows a stream.

  Args:
    path: of the file.
    compression: one of `formats.COMPRESSIONS`.
  Raises:
    ValueError: the file is damaged, or ends too early.
  """
  opened, errors = _decompressor(compression)
  name = formats.COMPRESSIONS[compression]
  stream = None
  with open(path, "rb") as packed:
    for data in iter(lambda: packed.read(CHUNK_BYTES), b""):
      while data:
        if stream is None:
          data = data.lstrip(b"\0")
          if not data:
            break
          stream = opened()
        try:
          yield stream.decompress(data)
        except errors as error:
          raise ValueError(
            f"{path}: is not a whole {name} file ({error})"
          ) from error
        data = stream.unused_data if stream.eof else b""
        stream = None if stream.eof else stream
  if stream is not None:
    raise ValueError(f"{path}: is not a whole {name} file (it ends too early)")


def _decompressor(
  compression: str,
) -> tuple[Callable[[], Any], tuple[type[Exception], ...]]:
  """Returns what opens a stream, and the errors that it may raise."""
  if compression == ".gz":
    return lambda: zlib.decompressobj(16 + zlib.MAX_WBITS), (zlib.error,)
  if compression == ".bz2":
    return bz2.BZ2Decompressor, (OSError, EOFError)
  if compression == ".xz":
    return lzma.LZMADecompressor, (lzma.LZMAError,)
  import zstandard  # here, as only .zst files need it

  opened = zstandard.ZstdDecompressor().decompressobj
  return opened, (zstandard.ZstdError,)
