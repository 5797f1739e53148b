"""Tests of files and folders that a crash leaves whole, and of locks."""

import os
import re
import resource

import pytest

from ultramem_jax.runs import files
from ultramem_jax.runs.files import lock, write_atomically, written_whole


@pytest.mark.parametrize("kind", ["absent", "empty", "link"])
def test_a_folder_appears_when_all_is_written(kind, tmp_path):
  folder = tmp_path / "folder"
  if kind == "empty":
    folder.mkdir()
  if kind == "link":
    (tmp_path / "elsewhere").mkdir()
    folder.symlink_to(tmp_path / "elsewhere")
  with written_whole(folder) as partial:
    (partial / "below").mkdir()
    (partial / "below" / "file").write_text("all of it")
    assert not any(folder.glob("*"))
  assert (folder / "below" / "file").read_text() == "all of it"
  assert folder.is_symlink() == (kind == "link")
  assert not any(x.name.endswith(".partial") for x in tmp_path.iterdir())


def test_all_names_in_a_folder_are_on_the_disk_before_its_own(
  tmp_path, monkeypatch
):
  """A crash after the folder has its name must not find half of it."""
  synced = []
  monkeypatch.setattr(files, "sync_folder", lambda path: synced.append(path))
  with written_whole(tmp_path / "folder") as partial:
    (partial / "one" / "two").mkdir(parents=True)
    (partial / "one" / "two" / "file").write_text("content")
  assert set(synced[:-1]) == {partial, partial / "one", partial / "one" / "two"}
  assert synced[-1] == tmp_path


def test_nothing_is_left_of_a_folder_that_fails(tmp_path):
  folder = tmp_path / "folder"
  with pytest.raises(OSError, match="full"), written_whole(folder) as partial:
    (partial / "file").write_text("some of it")
    raise OSError("the disk is full")
  assert not any(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_as_it_was(tmp_path):
  path = tmp_path / "config.json"
  path.write_text("old")
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  # As on a full disk.
  resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
  try:
    with pytest.raises(OSError, match=re.escape(str(path))):
      write_atomically(path, bytes(100))
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_files_have_the_permissions_that_the_user_chose(tmp_path):
  write_atomically(tmp_path / "new", b"")
  (tmp_path / "plain").write_bytes(b"")
  modes = {(tmp_path / name).stat().st_mode for name in ("new", "plain")}
  assert len(modes) == 1


def test_a_lock_is_free_again_when_its_file_is_closed(tmp_path):
  held, other = (os.open(tmp_path, os.O_RDONLY) for _ in range(2))
  lock(held)
  with pytest.raises(BlockingIOError):
    lock(other)
  os.close(held)
  lock(other)
  os.close(other)
