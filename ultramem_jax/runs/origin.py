"""What a run knows of the pretrained model that it comes from.

The workdir's folder `pretrained` holds the model's own `config.json` and other
small files, for those who export the run's model to where it came from.
"""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from ultramem_jax.runs.files import write_atomically
from ultramem_jax.settings.json_file import read_mapping

FOLDER = "pretrained"


def keep(workdir: str | os.PathLike, files: Mapping[str, bytes]) -> None:
  """Keeps files of the pretrained model, on process 0.

  Args:
    workdir: the run's.
    files: contents by name.
  """
  if jax.process_index() > 0:
    return
  folder = pathlib.Path(workdir, FOLDER)
  folder.mkdir(exist_ok=True)
  for name, content in files.items():
    write_atomically(folder / name, content)


def files(workdir: str | os.PathLike) -> dict[str, pathlib.Path]:
  """Returns the paths of the files that a run keeps, by name."""
  folder = pathlib.Path(workdir, FOLDER)
  return {path.name: path for path in sorted(folder.glob("[!.]*"))}


def copy(source: str | os.PathLike, workdir: str | os.PathLike) -> None:
  """Keeps what another run keeps; nothing if it keeps nothing."""
  held = {name: path.read_bytes() for name, path in files(source).items()}
  if held:
    keep(workdir, held)


def read(workdir: str | os.PathLike, name: str) -> dict[str, Any]:
  """Returns the mapping of a JSON file that a run keeps; {} if it does not.

  Raises:
    ConfigError: the file is damaged.
  """
  path = pathlib.Path(workdir, FOLDER, name)
  return read_mapping(path) if path.exists() else {}
