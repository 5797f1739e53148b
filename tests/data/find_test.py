"""Finding files: by globs and folders, each once, and none in silence."""

import os
import pathlib
import socket

import pytest

from ultramem_jax.data import find
from ultramem_jax.settings.errors import ConfigError


@pytest.fixture
def folder(tmp_path):
  """Seven files in four folders, and links to them and between them."""
  for name in (
    "a.txt",
    "b.md",
    "x/c.txt",
    "x/y/d.txt",
    "x/y/.hidden.txt",
    "z/e.txt",
    ".git/f.txt",
  ):
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(name)
  return tmp_path


def names(pattern, field="data.path"):
  found = find.find(str(pattern), field)
  return [file.name for file in found.files]


def test_globs_match_as_in_a_shell(folder, monkeypatch):
  for pattern, expected in [
    ("*.txt", ["a.txt"]),
    ("?.*", ["a.txt", "b.md"]),
    ("*/*.txt", ["x/c.txt", "z/e.txt"]),
    ("**/*.txt", ["a.txt", "x/c.txt", "x/y/d.txt", "z/e.txt"]),
    ("x/**", ["c.txt", "y/d.txt"]),
    ("x/**/d.txt", ["y/d.txt"]),
    ("**/y/**", ["x/y/d.txt"]),
    ("x/y/.*", [".hidden.txt"]),
    ("[xz]/[c-d].txt", ["x/c.txt"]),
    ("x/c.txt", ["c.txt"]),
  ]:
    assert names(folder / pattern) == expected
    monkeypatch.chdir(folder)
    assert names(pattern) == expected
    assert names(f"./{pattern}") == expected
  monkeypatch.setenv("HOME", str(folder))
  assert names("~/x/*") == ["c.txt"]


def test_links_lead_to_nothing_twice(folder):
  """To a folder above, between folders, to a file, and hard ones."""
  plain = names(folder / "**")
  assert plain == ["a.txt", "b.md", "x/c.txt", "x/y/d.txt", "z/e.txt"]
  (folder / "x" / "up").symlink_to(folder)
  (folder / "x" / "y" / "up").symlink_to(folder)
  (folder / "0").symlink_to(folder / "z")
  (folder / "0.txt").symlink_to(folder / "a.txt")
  assert names(folder / "**") == plain
  assert names(folder) == plain
  assert len(names(folder / "**/up/**/*.txt")) == 4
  assert names(folder / "*.txt") == ["a.txt"]
  # Only a link leads there.
  assert names(folder / "0*/*") == ["0/e.txt"]
  os.link(folder / "a.txt", folder / "same.txt")
  assert names(folder / "**") == plain


def test_a_folder_is_the_files_below_it(folder):
  (folder / "x" / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
  (folder / "x" / "numbers").write_bytes(b"a\0b")
  (folder / "x" / "lines.jsonl.gz").write_bytes(b"\x1f\x8b")
  os.mkfifo(folder / "x" / "pipe")
  (folder / "x" / "nothing").symlink_to("nowhere")
  found = find.find(f"{folder}/x/", "data.path")
  assert [file.name for file in found.files] == [
    "c.txt",
    "lines.jsonl.gz",
    "y/d.txt",
  ]
  assert sorted(pathlib.Path(path).name for path in found.left_out) == [
    "nothing",
    "numbers",
    "picture.png",
    "pipe",
  ]


def test_what_is_no_file_is_refused(folder):
  os.mkfifo(folder / "z" / "pipe")
  (folder / "y").mkdir()
  (folder / "y" / "nothing").symlink_to("nowhere")
  server = socket.socket(socket.AF_UNIX)
  server.bind(str(folder / "y" / "plug"))
  for pattern, message in [
    ("z/*", "z/pipe is not a regular file, but a pipe, a device or a socket"),
    ("z/pipe", "z/pipe is not a regular file"),
    ("y/p*", "y/plug is not a regular file"),
    ("y/*", "y/nothing is a link to nothing"),
    ("y/nothing", "y/nothing is a link to nothing"),
    ("/dev/zero", "/dev/zero is not a regular file"),
    ("*.none", "matches no file"),
    ("none/*", "matches no file"),
    ("none", "matches no file"),
    ("a.txt/b", "matches no file"),
  ]:
    with pytest.raises(ConfigError) as caught:
      find.find(str(folder / pattern), "data.path")
    assert str(caught.value).startswith("data.path = '")
    assert str(caught.value).endswith(message) or message in str(caught.value)
  server.close()


def test_a_folder_that_may_not_be_read_is_no_empty_one(folder, monkeypatch):
  listed = os.scandir

  def scandir(path):
    if os.path.basename(path) == "y":
      raise PermissionError(13, "Permission denied", path)
    return listed(path)

  # Permissions do not stop the superuser, who runs tests in containers.
  monkeypatch.setattr(os, "scandir", scandir)
  for pattern in ("**/*.txt", "x/*/*.txt", ""):
    with pytest.raises(PermissionError, match="x/y"):
      find.find(str(folder / pattern), "data.path")
