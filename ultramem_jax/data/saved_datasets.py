"""Folders that the library `datasets` of Hugging Face wrote, by save_to_disk.

Such a folder has Arrow streams, `state.json`, which lists them in order, and
`dataset_info.json`. A folder of several splits has a `dataset_dict.json`, and
such a folder for each.
"""

import json
import os

from ultramem_jax.settings.errors import ConfigError

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"


def files(folder: str) -> list[str] | None:
  """Returns the paths of the data of a saved dataset; None for other folders.

  Raises:
    ConfigError: it has several splits, or its state.json is damaged, or it
      names files that are not there, or that only select rows.
  """
  if os.path.isfile(os.path.join(folder, _SPLITS)):
    raise ConfigError(
      f"{folder}: holds several splits of a dataset; name the folder of one, "
      "and that of another as data.valid_path"
    )
  path = os.path.join(folder, _STATE)
  if not (os.path.isfile(path) and os.path.isfile(os.path.join(folder, _INFO))):
    return None
  try:
    with open(path, encoding="utf-8") as file:
      state = json.load(file)
    names = [str(each["filename"]) for each in state["_data_files"]]
    selects = bool(state.get("_indices_data_files"))
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConfigError(
      f"{path}: is damaged ({type(error).__name__}: {error})"
    ) from error
  paths = [os.path.join(folder, name) for name in names]
  for name, each in zip(names, paths, strict=True):
    if name != os.path.basename(name):
      raise ConfigError(f"{path}: {name!r} is not a file of this folder")
    if not os.path.isfile(each):
      raise ConfigError(f"{path}: {each} is missing")
  if selects:
    raise ConfigError(
      f"{path}: the dataset is a selection of rows; save it after "
      "flatten_indices()"
    )
  return paths
