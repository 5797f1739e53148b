"""Converts a TFRecord dataset of TensorFlow Datasets to ArrayRecord.

  python -m ultramem_jax convert SOURCE TARGET

SOURCE is the directory that holds dataset_info.json, such as
~/tensorflow_datasets/c4/en/3.0.1; TARGET must not exist, and appears when all
is written. ArrayRecord files can be read in any order, so that training
shuffles the whole corpus. TensorFlow is not needed.
"""

from pathlib import Path

from ultramem_jax.data import convert


def define_flags() -> None:
  """Defines nothing: the command has positional arguments only."""


def main(source: str, target: str) -> None:
  convert.convert(Path(source).expanduser(), Path(target).expanduser())
