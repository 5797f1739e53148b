"""Remembers what was found in files, so that they need not be read again.

The index of a gigabyte takes seconds to make, and none to remember. A file is
the same if its path, size, time of modification and inode are.
"""

import contextlib
import json
import os
import secrets
import time
from typing import NamedTuple

import numpy as np

# To be raised when the same file would be indexed in another way.
_VERSION = 2

# A file changed this recently may change again within one time stamp.
_SETTLED_NS = 2 * 10**9

_COLUMNS = 4


class Scan(NamedTuple):
  """The documents of a file.

  places: [documents, 4] int64: line or row (from 1; 0 = the whole file), offset
    and length in bytes, in the file or in what it unpacks to, and the digest.
  undecodable: how many bytes are not UTF-8.
  """

  places: np.ndarray
  undecodable: int


class IndexCache:
  """Scans of files by what `os.stat` says of them.

  Args:
    path: the file that holds the scans of an earlier start; one that is absent
      or damaged holds none. "": nothing is remembered.
  """

  def __init__(self, path: str | os.PathLike = ""):
    self._path = os.fspath(path)
    self._held = _load(self._path)
    self._used: dict[str, Scan] = {}

  def key(self, path: str, form: str) -> str:
    """Returns the cache key of a file; "" if it changed too recently to cache.

    Args:
      path: of the file.
      form: what else decides which documents it holds.
    """
    found = os.stat(path)
    if time.time_ns() - found.st_mtime_ns < _SETTLED_NS:
      return ""
    identity = found.st_size, found.st_mtime_ns, found.st_ino
    return json.dumps([_VERSION, os.path.abspath(path), form, *identity])

  def get(self, key: str) -> Scan | None:
    """Returns the scan of a key, if there is one."""
    scan = self._held.get(key)
    if scan is not None:
      self._used[key] = scan
    return scan

  def put(self, key: str, scan: Scan) -> None:
    """Remembers a scan, unless the key is ""."""
    if key:
      self._used[key] = scan

  def save(self) -> None:
    """Writes the scans that were used to the file, if any of them is new.

    Raises:
      OSError: the file cannot be written.
    """
    if not self._path or self._used.keys() <= self._held.keys():
      return
    # Processes of several hosts may write at the same time.
    partial = f"{self._path}.{secrets.token_hex(8)}.tmp"
    scans = self._used.values()
    try:
      with open(partial, "xb") as file:
        np.savez(
          file,
          keys=np.array(json.dumps([*self._used])),
          counts=np.array([len(scan.places) for scan in scans], np.int64),
          undecodable=np.array([scan.undecodable for scan in scans], np.int64),
          places=np.concatenate([scan.places for scan in scans]),
        )
      os.replace(partial, self._path)
    except OSError:
      with contextlib.suppress(OSError):
        os.unlink(partial)
      raise


def _load(path: str) -> dict[str, Scan]:
  """Reads the scans that `IndexCache.save` wrote; none if it cannot."""
  if not os.path.isfile(path):
    return {}
  try:
    with np.load(path, allow_pickle=False) as held:
      keys = json.loads(str(held["keys"]))
      ends = held["counts"].cumsum()
      places = held["places"].reshape(-1, _COLUMNS)
      parts = np.split(places, ends[:-1])
      lost = held["undecodable"].tolist()
      scans = [Scan(*scan) for scan in zip(parts, lost, strict=True)]
      whole = len(places) == held["counts"].sum()
      return dict(zip(keys, scans, strict=True)) if whole else {}
  except Exception:  # whatever is wrong with it, the files can be read again
    return {}
