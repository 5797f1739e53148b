"""Which text is trained on and which is held out: of files, of the library."""

import functools
import os
import sysconfig
from collections.abc import Iterable, Sequence

import numpy as np

from ultramem_jax.data import find, text_index
from ultramem_jax.data.forms import Form
from ultramem_jax.data.index_cache import IndexCache
from ultramem_jax.data.text_files import TextDocuments
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.data import DataConfig
from ultramem_jax.settings.errors import ConfigError

# Tests are long and repetitive; the others come and go between systems.
_LEFT_OUT = {
  "test",
  "tests",
  "idle_test",
  "lib2to3",
  "site-packages",
  "dist-packages",
  "__pycache__",
}


class TextSplits:
  """The train and validation documents of the standard library or of files.

  Documents are held out by a hash of their names. Where that leaves a split
  without any, as of a single file, the last part of each text is held out.
  Reading a split raises ConfigError if it cannot be made.
  """

  def __init__(self, data: DataConfig, cache: IndexCache):
    self._data, self._cache = data, cache
    self._form = Form(data)

  @functools.cached_property
  def train(self) -> TextDocuments:
    """The documents to train on, whole."""
    if self._has_valid_path:
      return self._everything
    return self._required(self._parts[0], "train")

  @functools.cached_property
  def valid(self) -> TextDocuments:
    """The documents to evaluate on."""
    if self._has_valid_path:
      return self._of_valid_path
    return self._required(self._parts[1], "valid")

  def remarks(self, mixed: Sequence[TextDocuments]) -> list[str]:
    """Returns what a user should know of both splits, a phrase each.

    Args:
      mixed: what is trained on besides the train split.
    """
    found = []
    train, valid = self.train, self.valid
    if not self._has_valid_path and self._cuts_off:
      share = f"{self._data.valid_fraction:.3g}"
      found.append(f"validation is the last part ({share}) of each text")
    known = valid.digests[valid.digests != 0]
    learned = np.concatenate([each.digests for each in (train, *mixed)])
    if repeated := int(np.isin(known, learned).sum()):
      found.append(f"validation documents that are in train, too: {repeated}")
    texts, files = [self._everything], [self._files]
    if self._has_valid_path:
      texts.append(self._of_valid_path)
      files.append(self._valid_files)
    return found + unread(texts, files)

  def inputs(self, split: str) -> dict[str, dict[str, str]]:
    """Returns the contents of the files of a split, by setting and name."""
    if split == "valid" and self._has_valid_path:
      return {"data.valid_path": self._of_valid_path.contents()}
    is_stdlib = self._data.source == "stdlib"
    field = "data.source" if is_stdlib else "data.path"
    return {field: self._everything.contents()}

  @property
  def _has_valid_path(self) -> bool:
    return self._data.source == "text" and bool(self._data.valid_path)

  @functools.cached_property
  def _files(self) -> find.Found:
    """The files of the standard library or of `data.path`."""
    if self._data.source == "stdlib":
      return find.Found(_stdlib_files(), [])
    return find.find(self._data.path, "data.path")

  @functools.cached_property
  def _valid_files(self) -> find.Found:
    return find.find(self._data.valid_path, "data.valid_path")

  @functools.cached_property
  def _everything(self) -> TextDocuments:
    """The documents of the standard library or of `data.path`."""
    is_stdlib = self._data.source == "stdlib"
    return self._index(self._files, "source" if is_stdlib else "path")

  @functools.cached_property
  def _of_valid_path(self) -> TextDocuments:
    return self._index(self._valid_files, "valid_path")

  @functools.cached_property
  def _held_out(self) -> np.ndarray:
    return self._everything.held_out(self._data.valid_fraction)

  @functools.cached_property
  def _cuts_off(self) -> bool:
    """Whether the hash does not split the documents, and cutting them does."""
    splits = self._held_out.any() and not self._held_out.all()
    return not splits and self._everything.can_be_cut()

  @functools.cached_property
  def _parts(self) -> tuple[TextDocuments, TextDocuments]:
    """The documents of `_everything` to train on, and those held out."""
    if self._cuts_off:
      return self._everything.cut_off(self._data.valid_fraction)
    subset = self._everything.subset
    return subset(~self._held_out), subset(self._held_out)

  def _required(self, part: TextDocuments, split: str) -> TextDocuments:
    require(
      len(part) > 0,
      "data.valid_fraction",
      self._data.valid_fraction,
      f"leaves none of the {len(self._everything)} documents for {split}; "
      "change it, or set data.valid_path to other files",
    )
    return part

  def _index(self, found: find.Found, name: str) -> TextDocuments:
    """Indexes the files that a field of the data section names."""
    field, value = f"data.{name}", getattr(self._data, name)
    return text_index.index(found.files, self._form, field, value, self._cache)


def unread(
  texts: Iterable[TextDocuments], files: Iterable[find.Found]
) -> list[str]:
  """Returns remarks on bytes that were replaced and files left out."""
  lost = sum(each.undecodable for each in texts)
  left_out = [path for each in files for path in each.left_out]
  found = [f"bytes that are not UTF-8: {lost}"] if lost else []
  if left_out:
    found.append(
      f"files without text that are left out: {len(left_out)}, such as "
      f"{left_out[0]!r}"
    )
  return found


def _stdlib_files() -> list[find.TextFile]:
  """Lists the .py files of the interpreter's library without its tests."""
  root = sysconfig.get_paths()["stdlib"]
  paths = []
  for directory, subdirectories, names in os.walk(root):
    subdirectories[:] = [d for d in subdirectories if d not in _LEFT_OUT]
    paths += [os.path.join(directory, n) for n in names if n.endswith(".py")]
  paths = [path for path in paths if os.path.isfile(path)]  # no dead links
  if not paths:
    raise ConfigError(
      f"data.source = 'stdlib': no .py file in {root}; use data.source = 'text'"
    )
  return find.listed(paths, root)
