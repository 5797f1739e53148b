"""Datasets prepared by TensorFlow Datasets, read without TensorFlow.

The directory of a dataset holds `dataset_info.json`, `features.json` and its
examples, in ArrayRecord files (random access) or TFRecord files (streamed;
`python -m ultramem_jax convert` turns them into the former).
"""

import bisect
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds

from ultramem_jax.data import indexed, tfrecord
from ultramem_jax.data.documents import Source
from ultramem_jax.data.text_files import fingerprint
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.data import DataConfig
from ultramem_jax.settings.errors import ConfigError, DataError, first_line

# How much of a large file is compared.
_PARTS, _PART_BYTES = 8, 1 << 14

_VERSION = re.compile(r"\d+\.\d+\.\d+")


class Examples:
  """The texts of ArrayRecord examples, as a sequence of str.

  Args:
    data_source: the examples, serialized.
    files: TFDS's instructions, which files they are in.
    parse: returns the text of one.
  """

  def __init__(
    self, data_source: Any, files: Sequence[Any], parse: Callable[[bytes], str]
  ):
    self._data_source, self._parse = data_source, parse
    self._paths = [str(file.filename) for file in files]
    self._ends = list(itertools.accumulate(file.take for file in files))

  def __len__(self) -> int:
    return len(self._data_source)

  def __repr__(self) -> str:
    return f"Examples({len(self)})"

  def __getitem__(self, index: int) -> str:
    try:
      return self._parse(self._data_source[index])
    except Exception as error:  # ArrayRecord raises nothing more precise
      path = self._paths[bisect.bisect(self._ends, index)]
      raise DataError(f"{path}: {first_line(error)}") from error


def load(data: DataConfig, split: str) -> Source:
  """Opens a split of the dataset `data.tfds_name`.

  Args:
    data: the data section of the configuration.
    split: "train" or "valid": which of `train_split`, `valid_split`.
  Returns:
    An IndexedSource for ArrayRecord files, a RecordSource for TFRecord files.
  Raises:
    ConfigError: there is no such dataset on disk, split or text field, or files
      are missing or have another format.
  """
  directory, builder = _open(data)
  parse = _parser(builder.info.features, data.text_field)
  field = f"data.{split}_split"
  name = getattr(data, f"{split}_split")
  try:
    split_info = builder.info.splits[name]
    files = split_info.file_instructions
  except (ValueError, KeyError) as error:
    known = ", ".join(builder.info.splits)
    raise ConfigError(
      f"{field} = {name!r}: is not a split of {directory}; known: {known}, "
      "and slices such as 'train[:10%]'"
    ) from error
  require(bool(files), field, name, f"holds no example of {directory}")
  for file in files:
    require(
      os.path.isfile(file.filename),
      "data.tfds_name",
      data.tfds_name,
      f"is not whole: {file.filename} is missing",
    )

  file_format = builder.info.file_format.value
  num_bytes = getattr(split_info, "num_bytes", 0)
  if file_format == "array_record":
    raw = tfds.decode.DeserializeMethod.RAW_BYTES
    examples = builder.as_data_source(name, deserialize_method=raw)
    texts = Examples(examples, files, parse)
    return indexed.IndexedSource(texts, len(texts), num_bytes)
  require(
    file_format == "tfrecord",
    "data.tfds_name",
    data.tfds_name,
    f"is in {file_format} files; array_record and tfrecord can be read",
  )
  parts = [
    tfrecord.Part(str(file.filename), file.skip, file.skip + file.take)
    for file in files
  ]
  return tfrecord.RecordSource(parts, parse, data.shuffle_window, num_bytes)


def find(name: str, data_dir: str) -> str:
  """Finds the directory of a dataset.

  Args:
    name: `name[/config][:version]`; without a version, the newest on disk.
    data_dir: where datasets lie; "" = ~/tensorflow_datasets.
  Returns:
    The directory that holds `dataset_info.json`.
  Raises:
    ConfigError: no such dataset is there.
  """
  root = os.path.expanduser(data_dir or "~/tensorflow_datasets")
  base, _, version = name.partition(":")
  directory = os.path.join(root, base, version)
  if not version and os.path.isdir(directory):
    versions = filter(_VERSION.fullmatch, os.listdir(directory))
    numbers = lambda v: tuple(map(int, v.split(".")))
    version = max(versions, key=numbers, default="")
    directory = os.path.join(directory, version)
  found = os.path.isfile(os.path.join(directory, "dataset_info.json"))
  require(
    found,
    "data.tfds_name",
    name,
    f"no dataset_info.json in {directory}; set data.tfds_dir to the local "
    f"directory that holds {os.path.join(base, version or '<version>')}",
  )
  return directory


def open_builder(directory: str, field: str, value: str) -> Any:
  """Opens the metadata of a dataset.

  Args:
    directory: what `find` returned.
    field, value: the setting that names the dataset, for the error.
  Returns:
    TFDS's builder of the directory.
  Raises:
    ConfigError: the metadata cannot be read, or name classes of others.
  """
  try:
    _require_known_features(os.path.join(directory, "features.json"))
    return tfds.builder_from_directory(directory)
  except Exception as error:  # from JSON, protobuf or TFDS
    raise ConfigError(
      f"{field} = {value!r}: the metadata in {directory} cannot be read "
      f"({first_line(error)})"
    ) from error


def _open(data: DataConfig) -> tuple[str, Any]:
  """Returns the folder of the dataset `data.tfds_name`, and its builder."""
  directory = find(data.tfds_name, data.tfds_dir)
  return directory, open_builder(directory, "data.tfds_name", data.tfds_name)


def shared(data: DataConfig) -> int:
  """Returns how many examples are in both splits, as slices may overlap."""
  _, builder = _open(data)
  train, valid = (
    builder.info.splits[name].file_instructions
    for name in (data.train_split, data.valid_split)
  )
  return sum(
    max(0, min(a.skip + a.take, b.skip + b.take) - max(a.skip, b.skip))
    for a in train
    for b in valid
    if a.filename == b.filename
  )


def inputs(data: DataConfig, split: str) -> dict[str, dict[str, str]]:
  """Returns what a split is read from: contents by setting and file.

  A dataset can be too large to be read before each run. Large files are told
  apart by their size and by parts of them.
  """
  directory, builder = _open(data)
  field = f"{split}_split"
  instructions = builder.info.splits[getattr(data, field)].file_instructions
  paths = [os.path.join(directory, "features.json")]
  paths += [str(file.filename) for file in instructions]
  return {f"data.{field}": {os.path.basename(p): _sampled(p) for p in paths}}


def _sampled(path: str) -> str:
  """Returns the `fingerprint` of a file, of parts if it is large."""
  size = os.path.getsize(path)
  with open(path, "rb") as file:
    if size <= _PARTS * _PART_BYTES:
      return fingerprint(size, file.read())
    parts = []
    for part in range(_PARTS):
      file.seek((size - _PART_BYTES) * part // (_PARTS - 1))
      parts.append(file.read(_PART_BYTES))
  return fingerprint(size, b"".join(parts))


def _require_known_features(path: str) -> None:
  """Raises ValueError if a features.json names a class that is not TFDS's own.

  TFDS would import the module of any class.
  """
  if not os.path.isfile(path):
    raise ValueError("there is no features.json")
  known = {
    f"{cls.__module__}.{cls.__name__}"
    for cls in vars(tfds.features).values()
    if isinstance(cls, type) and issubclass(cls, tfds.features.FeatureConnector)
  }
  with open(path) as file:
    for name in _class_names(json.load(file)):
      if name not in known:
        raise ValueError(
          f"features.json names {name}, which is not a class of tfds.features"
        )


def _class_names(node: Any) -> Iterator[str]:
  """Yields the names of classes in a features.json and in JSON inside it."""
  if isinstance(node, list):
    for child in node:
      yield from _class_names(child)
  elif isinstance(node, dict):
    for key, child in node.items():
      if not isinstance(child, str):
        yield from _class_names(child)
      elif key in ("type", "pythonClassName", "python_class_name"):
        yield child
      elif key in ("json", "content"):
        yield from _class_names(json.loads(child))


def _parser(features: Any, text_field: str) -> Callable[[bytes], str]:
  """Returns the function from a serialized example to its text."""
  known = features if isinstance(features, tfds.features.FeaturesDict) else {}
  text_features = [
    key for key in known if isinstance(features[key], tfds.features.Text)
  ]
  require(
    text_field in text_features,
    "data.text_field",
    text_field,
    f"is not a text feature of the dataset; known: {', '.join(text_features)}",
  )
  # Decoding the one field is three times as fast as decoding C4's five.
  wanted = tfds.features.FeaturesDict({text_field: features[text_field]})

  def parse(example: bytes) -> str:
    try:
      fields: Any = wanted.deserialize_example_np(example)
    except Exception as error:  # of protobuf or TFDS
      raise DataError(first_line(error)) from error
    if fields[text_field] is None:
      raise DataError(f"an example has no field {text_field!r}")
    return fields[text_field].decode(errors="replace")

  return parse
