"""Where documents come from: one interface over three kinds of source.

stdlib  the Python files of the running interpreter's standard library
text    local files that a glob names
tfds    a dataset that TensorFlow Datasets prepared
"""

import functools
import os
import sysconfig

from ultramem_jax.data import indexed, text_files
from ultramem_jax.data.documents import Source
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import DataConfig
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


class Splits:
  """Both splits of the configured source; each is opened when first read.

  Reading `train` or `valid` raises ConfigError if nothing is there, or nothing
  that can be read, or no document with text.
  """

  def __init__(self, data: DataConfig):
    self._data = data

  @functools.cached_property
  def train(self) -> Source:
    """The documents to train on; text files longer than cut_bytes are cut."""
    if self._data.source == "tfds":
      return _open_tfds(self._data, "train")
    documents = self._text_documents("train")
    limit = self._data.cut_bytes
    return indexed.IndexedSource(
      documents.cut(limit) if limit else documents,
      len(documents),
      documents.num_bytes,
    )

  @functools.cached_property
  def valid(self) -> Source:
    """The documents to evaluate on, whole."""
    if self._data.source == "tfds":
      return _open_tfds(self._data, "valid")
    documents = self._text_documents("valid")
    return indexed.IndexedSource(documents, len(documents), documents.num_bytes)

  def _text_documents(self, split: str) -> text_files.TextDocuments:
    """Returns the documents of a split of the standard library or of files."""
    data = self._data
    if split == "valid" and data.source == "text" and data.valid_path:
      return _index_path(data, "valid_path")
    if data.source == "text" and data.valid_path:
      return self._indexed
    held_out = self._indexed.held_out(data.valid_fraction)
    part = self._indexed.subset(held_out if split == "valid" else ~held_out)
    require(
      len(part) > 0,
      "data.valid_fraction",
      data.valid_fraction,
      f"leaves no document for {split}, of {len(self._indexed)} in all; "
      "change it, or set data.valid_path to files of their own",
    )
    return part

  @functools.cached_property
  def _indexed(self) -> text_files.TextDocuments:
    """The documents of the standard library or of `data.path`."""
    if self._data.source == "stdlib":
      files = _stdlib_files()
      return _index(files, self._data, "data.source", self._data.source)
    return _index_path(self._data, "path")


def _open_tfds(data: DataConfig, split: str) -> Source:
  # Imported here, as TensorFlow Datasets takes a second to import.
  from ultramem_jax.data import tfds_files

  source = tfds_files.load(data, split)
  field = f"{split}_split"
  require(
    any(source.documents()),
    f"data.{field}",
    getattr(data, field),
    "holds no document with text",
  )
  return source


def _index_path(data: DataConfig, field: str) -> text_files.TextDocuments:
  """Indexes the files that a field of the data section names."""
  pattern = getattr(data, field)
  files = text_files.find(pattern, f"data.{field}")
  return _index(files, data, f"data.{field}", pattern)


def _index(
  files: list[text_files.TextFile], data: DataConfig, field: str, value: str
) -> text_files.TextDocuments:
  documents = text_files.index(files, data.text_field, field, value)
  require(
    len(documents) > 0,
    field,
    value,
    f"holds no text: the {len(files)} files there are empty",
  )
  return documents


def _stdlib_files() -> list[text_files.TextFile]:
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
  return text_files.listed(paths, root)
