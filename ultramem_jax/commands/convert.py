"""Converts a TFRecord dataset of TensorFlow Datasets to ArrayRecord.

  python -m ultramem_jax convert SOURCE TARGET

SOURCE is the directory that holds dataset_info.json, such as
~/tensorflow_datasets/c4/en/3.0.1; TARGET must not exist, and appears when all
is written. ArrayRecord files can be read in any order, so that training
shuffles the whole corpus. TensorFlow is not needed.
"""

from pathlib import Path

from ultramem_jax.data import convert
from ultramem_jax.runs.files import written_whole
from ultramem_jax.settings.checks import require


def define_flags() -> None:
  """Defines nothing: the command has positional arguments only."""


def main(source: str, target: str) -> None:
  folder = Path(target).expanduser()
  require(not folder.exists(), "TARGET", target, "exists already")
  with written_whole(folder) as partial:
    convert.convert(Path(source).expanduser(), partial)
