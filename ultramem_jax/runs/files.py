"""Files and folders that a crash leaves whole: old, or new; and their locks."""

import contextlib
import fcntl
import os
import pathlib
import secrets
import shutil
from collections.abc import Iterator


def write_atomically(path: pathlib.Path, content: bytes) -> None:
  """Writes a file so that a crash leaves its old or its new content, whole.

  Raises:
    OSError: it cannot be written, and is as it was.
  """
  # A name that nobody knows, so that no link waits there, and a hidden one: a
  # kill may leave the file behind.
  partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
  try:
    with open(partial, "xb") as f:
      f.write(content)
      f.flush()
      os.fsync(f.fileno())
    os.replace(partial, path)
  except OSError as error:
    with contextlib.suppress(OSError):
      partial.unlink()
    raise OSError(error.errno, error.strerror, str(path)) from error
  sync_folder(path.parent)


def sync_folder(path: pathlib.Path) -> None:
  """Forces the names in a folder to the disk: new files, and renamed ones."""
  folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
  try:
    os.fsync(folder)
  finally:
    os.close(folder)


def sync_tree(path: pathlib.Path) -> None:
  """Forces a folder's files to the disk, their names, and those of folders."""
  for entry in sorted(path.rglob("*")):
    if entry.is_dir():
      sync_folder(entry)
    else:
      with open(entry, "rb") as f:
        os.fsync(f.fileno())
  sync_folder(path)


def make_folder(path: pathlib.Path) -> None:
  """Makes a folder and its parents, and forces their names to the disk."""
  new = [folder for folder in (path, *path.parents) if not folder.exists()]
  path.mkdir(parents=True, exist_ok=True)
  for folder in new:
    sync_folder(folder.parent)


@contextlib.contextmanager
def written_whole(folder: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields a temporary folder, which is renamed to `folder` if nothing fails.

  Args:
    folder: absent, or empty; or a link to such a folder.
  """
  folder = pathlib.Path(folder).resolve()
  partial = folder.with_name(f".{folder.name}.partial")
  shutil.rmtree(partial, ignore_errors=True)  # of one that was killed
  partial.mkdir(parents=True)
  try:
    yield partial
    sync_tree(partial)
    partial.rename(folder)
    sync_folder(folder.parent)
  finally:
    shutil.rmtree(partial, ignore_errors=True)


def lock(file: int) -> None:
  """Locks an open file, until it is closed or the process ends, however.

  Args:
    file: its descriptor.
  Raises:
    BlockingIOError: it is locked already.
  """
  fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
