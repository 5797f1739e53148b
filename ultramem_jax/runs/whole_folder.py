"""A folder that appears whole, or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from ultramem_jax.runs import workdir as workdir_lib


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
    for path in (x for x in partial.rglob("*") if x.is_file()):
      with open(path, "rb") as file:
        os.fsync(file.fileno())
    partial.rename(folder)
    workdir_lib.sync_folder(folder.parent)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
