"""Converts a TFRecord dataset of TensorFlow Datasets to ArrayRecord.

ArrayRecord files can be read in any order, so that training shuffles the whole
corpus. TensorFlow is not needed.
"""

import json
import os
import shutil
from pathlib import Path

from array_record.python import (
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
)

from ultramem_jax.data import tfrecord
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import DataError


def convert(source: Path, folder: Path) -> None:
  """Writes the dataset in source as ArrayRecord files.

  Args:
    source: directory with dataset_info.json and TFRecord files.
    folder: to which they are written, empty so far.
  Raises:
    ConfigError: source is not such a directory, or not whole.
    errors.DataError: a file is cut off, or longer than it should be.
    OSError: a file cannot be read, or written.
  """
  info_path = source / "dataset_info.json"
  require(
    info_path.is_file(),
    "SOURCE",
    str(source),
    "no dataset_info.json there; give the directory of the version, "
    "such as .../c4/en/3.0.1",
  )
  parts = _shards(source)
  info = json.loads(info_path.read_text())
  found = info.get("fileFormat", "tfrecord")
  require(
    found == "tfrecord",
    "SOURCE",
    str(source),
    f"holds {found} files; only tfrecord is converted",
  )
  for count, part in enumerate(parts, 1):
    _convert_shard(part, folder / _renamed(Path(part.path).name))
    print(f"{count}/{len(parts)} {part.path}", flush=True)
  info["fileFormat"] = "array_record"
  (folder / "dataset_info.json").write_text(json.dumps(info, indent=2))
  shutil.copy(source / "features.json", folder)


def _renamed(name: str) -> str:
  return name.replace(".tfrecord", ".array_record")


def _shards(source: Path) -> list[tfrecord.Part]:
  """Returns every file of a dataset, with the count of its records."""
  # A second to import: not for --help.
  from ultramem_jax.data import tfds_files

  builder = tfds_files.open_builder(str(source), "SOURCE", str(source))
  splits = builder.info.splits.values()
  for path in (path for split in splits for path in split.filepaths):
    require(
      os.path.isfile(path),
      "SOURCE",
      str(source),
      f"is not whole: {path} is missing, or no file",
    )
  return [
    tfrecord.Part(str(path), 0, length)
    for split in splits
    for path, length in zip(split.filepaths, split.shard_lengths, strict=True)
  ]


def _convert_shard(part: tfrecord.Part, target: Path) -> None:
  """Copies a file, which must hold the records of part and nothing else."""
  writer = array_record_module.ArrayRecordWriter(str(target), "group_size:1")
  end = 0
  for block in tfrecord.blocks(part):
    for data in block.records:
      writer.write(data)
    end = block.next_byte
  writer.close()
  size = os.path.getsize(part.path)
  if end != size:
    raise DataError(
      f"{part.path}: continues after its {part.stop} records, at byte {end} "
      f"of {size}; dataset_info.json does not belong to it"
    )
