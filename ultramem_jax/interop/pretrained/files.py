"""The files of a pretrained model's folder, and the tensors in them."""

import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from ultramem_jax.interop import files
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.json_file import read_mapping

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# A tensor is read in this many parts, so that little is held besides its array.
PARTS = 8


class Tensor(NamedTuple):
  """A tensor of a file, which is not read yet."""

  path: pathlib.Path
  name: str
  dtype: str
  shape: tuple[int, ...]

  def rows(self) -> Iterator[tuple[slice, np.ndarray]]:
    """Yields parts of the first axis, and what they hold."""
    size = max(1, -(-self.shape[0] // PARTS))
    with files.open_safetensors(self.path) as file:
      held = file.get_slice(self.name)
      for start in range(0, self.shape[0], size):
        rows = slice(start, min(start + size, self.shape[0]))
        yield rows, held[rows]


def find_folder(name: str) -> pathlib.Path:
  """Returns the folder of that name.

  Raises:
    ConfigError: there is none; the message says how to fetch a model of the
      Hugging Face hub.
  """
  folder = pathlib.Path(name).expanduser()
  if folder.is_dir():
    return folder
  how = "no such folder"
  if folder.exists():
    how = "must be a folder with config.json and .safetensors files"
  elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    here = name.partition("/")[2]
    how += (
      f"; a model of the hub is fetched by: hf download {name} --local-dir "
      f"{here}"
    )
  raise ConfigError(f"{name}: {how}")


def find_tensors(folder: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of a folder by name; reads only the files' headers.

  Raises:
    ConfigError: no files of tensors, a damaged one, or an index that names
      other tensors than the files hold, or files elsewhere.
  """
  single = folder / SINGLE
  if single.exists():
    return tensors_of(single)
  if not (folder / INDEX).exists():
    raise ConfigError(f"{folder}: holds neither {SINGLE} nor {INDEX}")
  places = read_mapping(folder / INDEX).get("weight_map")
  if not isinstance(places, dict) or not places:
    raise ConfigError(f"{folder / INDEX}: has no weight_map")
  if not all(isinstance(place, str) for place in places.values()):
    raise ConfigError(f"{folder / INDEX}: weight_map must name files")
  found, faults = {}, []
  for name in sorted(set(places.values())):
    parts = pathlib.PurePath(name).parts
    if pathlib.PurePath(name).is_absolute() or ".." in parts:
      faults.append(f"the file {name!r:.100} is not in the folder")
    elif not os.path.isfile(folder / name):  # which takes any name
      faults.append(f"the file {name!r:.100} is missing")
    else:
      held = tensors_of(folder / name)
      faults += [f"{x} is in two files" for x in sorted(set(held) & set(found))]
      found |= held
  if not faults:
    faults += [
      f"{name} is not in {place!r:.100}"
      for name, place in places.items()
      if name not in found or found[name].path != folder / place
    ]
    faults += [f"{name} is unknown" for name in found if name not in places]
  if faults:
    raise ConfigError(f"{folder / INDEX}: {'; '.join(faults)}")
  return found


def tensors_of(path: pathlib.Path) -> dict[str, Tensor]:
  """Returns the tensors of one file."""
  return {
    name: Tensor(path, name, *header)
    for name, header in files.headers(path).items()
  }
