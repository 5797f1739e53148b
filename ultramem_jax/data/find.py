"""Finds the files of a corpus, each once, whatever its paths are called."""

import fnmatch
import glob
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ultramem_jax.data import formats, saved_datasets
from ultramem_jax.settings.checks import require


class TextFile(NamedTuple):
  """A file: its path, and its name within the corpus.

  The name decides into which split the file falls.
  """

  path: str
  name: str


class Found(NamedTuple):
  """Files by name, and the paths in a folder that hold no text."""

  files: list[TextFile]
  left_out: list[str]


def find(pattern: str, field: str) -> Found:
  """Finds the files that a path, a glob or a folder names, ordered by name.

  A file that has several names, by links or by several paths, is found once.
  A folder means all files below it that begin like text, JSON lines, Parquet or
  Arrow, without hidden ones, which wildcards do not match either; or, if it is
  a saved dataset, the files of its data.

  Args:
    pattern: a path, `~` and the wildcards `* ? [] **` allowed.
    field: the setting that holds the pattern, for the error.
  Returns:
    The files, whose names are the paths below the part without wildcards, and
    those that were left out of a folder.
  Raises:
    ConfigError: no file matches, or one that does is not a regular file.
    OSError: a folder may not be read.
  """
  full = os.path.expanduser(pattern)
  left_out = []
  if os.path.isdir(full):
    root, paths = full, saved_datasets.files(full)
    if paths is None:
      paths = []
      for path in _expand(full, ["**"]):
        (paths if _begins_like_its_name(path) else left_out).append(path)
  else:
    root, parts = os.path.dirname(full), full.split(os.sep)
    top = os.sep if os.path.isabs(full) else ""
    paths = list(_expand(top, parts[bool(top) :]))
    for path in paths:
      require(os.path.isfile(path), field, pattern, f"{path} {_cause(path)}")
  require(bool(paths), field, pattern, "matches no file")
  while glob.has_magic(root):
    root = os.path.dirname(root)
  return Found(listed(_distinct(paths), root or os.curdir), left_out)


def listed(paths: Iterable[str], root: str) -> list[TextFile]:
  """Returns paths as TextFiles, named relative to root and ordered by name."""
  names = ((p, os.path.relpath(p, root).replace(os.sep, "/")) for p in paths)
  return sorted((TextFile(*n) for n in names), key=lambda file: file.name)


def _expand(folder: str, parts: Sequence[str]) -> Iterator[str]:
  """Yields what the parts of a glob match below a folder, but no folders.

  Unlike Python's own, a glob that meets a folder which may not be read is an
  error, and `**` enters a folder once, however many links lead there.
  """
  part, *rest = parts
  if part == "**":
    for below in _folders(folder or os.curdir):
      yield from _expand(below, rest or ["*"])
    return
  for path, is_folder in _matching(folder, part):
    if is_folder:
      yield from _expand(path, rest) if rest else ()
    elif not rest:
      yield path


def _matching(folder: str, part: str) -> list[tuple[str, bool]]:
  """Returns the paths in a folder that a part of a glob matches, ordered.

  Each is given with whether it is a folder.
  """
  if not glob.has_magic(part):
    path = os.path.join(folder, part)
    return [(path, os.path.isdir(path))] if os.path.lexists(path) else []
  with os.scandir(folder or os.curdir) as entries:
    return sorted(
      (os.path.join(folder, entry.name), entry.is_dir())
      for entry in entries
      if fnmatch.fnmatchcase(entry.name, part)
      and (entry.name[0] != "." or part[0] == ".")
    )


def _folders(top: str) -> Iterator[str]:
  """Yields top and each folder below it once, by way of links last."""
  seen, folders, links = set(), deque([top]), deque()
  while folders or links:
    folder = (folders or links).popleft()
    identity = _identity(folder)
    if identity in seen:
      continue
    seen.add(identity)
    yield folder
    for path, is_folder in _matching(folder, "*"):
      if is_folder:
        (links if os.path.islink(path) else folders).append(path)


def _identity(path: str) -> tuple[int, int]:
  """Returns what is the same for all paths of a file or folder."""
  found = os.stat(path)
  return found.st_dev, found.st_ino


def _distinct(paths: Iterable[str]) -> list[str]:
  """Returns a path for each file: the first by name that is not a link's."""
  same = {}
  for path in sorted(paths):
    same.setdefault(_identity(path), []).append(path)
  direct = lambda path: os.path.realpath(path) == os.path.abspath(path)
  return [next(filter(direct, group), group[0]) for group in same.values()]


def _begins_like_its_name(path: str) -> bool:
  """Returns whether a file may be text, JSON lines, Parquet or Arrow."""
  if not os.path.isfile(path):
    return False
  with open(path, "rb") as file:
    head = file.read(formats.HEAD_BYTES)
  expected = formats.stored(path)
  is_expected = formats.signature(head) == expected
  return is_expected and (bool(expected) or b"\0" not in head)


def _cause(path: str) -> str:
  """Returns why a path that matches is not a file to read."""
  if os.path.islink(path) and not os.path.exists(path):
    return "is a link to nothing"
  return "is not a regular file, but a pipe, a device or a socket"
