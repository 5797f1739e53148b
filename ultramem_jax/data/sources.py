"""Where documents come from: one interface over three kinds of source.

A source has `documents()`, every document once, in order; `lanes(...)`,
endless shuffled iterators with a state; `num_documents` and `num_bytes`
(as stored; 0 = unknown). Documents are str.
"""

import dataclasses
import os
import platform
import sysconfig
from typing import Any

from ultramem_jax.data import indexed, text_files
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


def load(data: DataConfig, split: str) -> Any:
  """Opens one split of the configured source.

  Args:
    data: the data section of the configuration.
    split: "train" or "valid".
  Returns:
    An IndexedSource, or a RecordSource for TFRecord files.
  Raises:
    ConfigError: nothing there, nothing readable, nothing but empty text.
  """
  if data.source == "tfds":
    # Imported here, as TensorFlow Datasets takes a second to import.
    from ultramem_jax.data import tfds_files

    source = tfds_files.load(data, split)
    field = f"data.{split}_split"
    value = getattr(data, f"{split}_split")
    require(
      any(source.documents()), field, value, "holds no document with text"
    )
    return source
  documents = _text_documents(data, split)
  if split == "train" and data.cut_bytes:
    documents = documents.cut(data.cut_bytes)
  return indexed.IndexedSource(documents, documents.num_bytes)


def describe(data: DataConfig) -> str:
  """One line about the corpus, to be recorded with a run."""
  if data.source == "stdlib":
    implementation = platform.python_implementation()
    label, unit = f"{implementation} {platform.python_version()}", "files"
    label = f"stdlib of {label}"
  else:
    name = data.path if data.source == "text" else data.tfds_name
    label, unit = f"{data.source} {name}", "documents"
  # As they lie there, not cut.
  data = dataclasses.replace(data, cut_bytes=0)
  train, valid = load(data, "train"), load(data, "valid")
  return (
    f"{label}: {_size(train, 'train', unit)}; "
    f"{_size(valid, 'validation', unit)}"
  )


def _size(source: Any, split: str, unit: str) -> str:
  megabytes = f", {source.num_bytes / 1e6:.1f} MB" if source.num_bytes else ""
  return f"{source.num_documents} {split} {unit}{megabytes}"


def _text_documents(data: DataConfig, split: str) -> text_files.TextDocuments:
  """The documents of a split of the standard library or of text files."""
  if data.source == "stdlib":
    field, value = "data.source", data.source
    files = _stdlib_files()
  else:
    own_files = split == "valid" and data.valid_path
    field = "data.valid_path" if own_files else "data.path"
    value = data.valid_path if own_files else data.path
    files = text_files.find(value, field)
  documents = text_files.index(files, data.text_field, field, value)
  require(
    len(documents) > 0,
    field,
    value,
    f"holds no text: the {len(files)} files there are empty",
  )
  if data.source == "text" and data.valid_path:
    return documents
  mask_D = documents.held_out(data.valid_fraction)
  part = documents.subset(mask_D if split == "valid" else ~mask_D)
  require(
    len(part) > 0,
    "data.valid_fraction",
    data.valid_fraction,
    f"leaves no document for {split}, of {len(documents)} in all; "
    "change it, or set data.valid_path to files of their own",
  )
  return part


def _stdlib_files() -> list[text_files.TextFile]:
  """The .py files of the running interpreter's library, but not its tests."""
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
