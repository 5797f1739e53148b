"""Tests of folders that appear whole, or not at all."""

import pytest

from ultramem_jax.runs.whole_folder import written_whole


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


def test_nothing_is_left_of_a_folder_that_fails(tmp_path):
  folder = tmp_path / "folder"
  with pytest.raises(OSError, match="full"), written_whole(folder) as partial:
    (partial / "file").write_text("some of it")
    raise OSError("the disk is full")
  assert not any(tmp_path.iterdir())
