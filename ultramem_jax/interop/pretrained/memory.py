"""The memories of a model beside the folder of its transformer.

`memory.safetensors` holds their parameters and buffers under our own names, in
the dtypes in which a run stores them. `memory.json` holds their settings, and
the digest of the transformer that they were trained in.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.interop import files as files_lib
from ultramem_jax.interop.files import Header
from ultramem_jax.interop.pretrained import write
from ultramem_jax.interop.pretrained.model import on_devices
from ultramem_jax.interop.tensors import Path
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.json_file import read_mapping

SETTINGS, TENSORS = "memory.json", "memory.safetensors"


class Memory(NamedTuple):
  """The memories of a folder; of their tensors only headers are read.

  settings: fields of MemoryConfig.
  backbone: `write.digest` of the transformer.
  tensors: by name.
  """

  folder: pathlib.Path
  settings: dict[str, Any]
  backbone: str
  tensors: dict[str, Header]


def write_memory(
  folder: pathlib.Path,
  settings: dict[str, Any],
  arrays: Mapping[Path, Any],
  backbone: str,
) -> None:
  """Writes the memories of a model, array by array.

  Args:
    folder: which exists.
    settings: fields of MemoryConfig.
    arrays: of the model's collections, by path; those of the memories.
    backbone: `write.digest` of the transformer.
  """
  named = {"/".join(map(str, path)): x for path, x in arrays.items()}
  headers = {
    name: Header(files_lib.NAMES[np.dtype(x.dtype)], x.shape)
    for name, x in named.items()
  }
  files_lib.write_safetensors(
    folder / TENSORS, headers, lambda name: np.asarray(named[name])
  )
  held = {"backbone_sha256": backbone, "memory": settings}
  write.write_json(folder / SETTINGS, held)


def open_memory(folder: pathlib.Path) -> Memory | None:
  """Opens the memories of a folder; None where it has none.

  Raises:
    ConfigError: a file is damaged.
  """
  path = folder / SETTINGS
  if not path.exists():
    return None
  held = read_mapping(path)
  settings, backbone = held.get("memory"), held.get("backbone_sha256")
  if not isinstance(settings, dict) or not isinstance(backbone, str):
    raise ConfigError(f"{path}: must hold memory and backbone_sha256")
  if not (folder / TENSORS).is_file():
    raise ConfigError(f"{folder}: holds no {TENSORS}")
  return Memory(folder, settings, backbone, files_lib.headers(folder / TENSORS))


def read_memory(
  memory: Memory, places: Mapping[Path, jax.ShapeDtypeStruct]
) -> dict[Path, jax.Array]:
  """Reads the memories, one array after another, to where they belong.

  Args:
    memory: of `open_memory`.
    places: shape, dtype and sharding of each of their arrays, by path.
  Raises:
    ConfigError: the file has other arrays, or numbers that are not finite.
  """
  named = {"/".join(map(str, path)): path for path in places}
  wanted = {
    name: Header(files_lib.NAMES[np.dtype(places[path].dtype)], x.shape)
    for name, path in named.items()
    for x in [places[path]]
  }
  path = memory.folder / TENSORS
  faults = [f"{name} is missing" for name in wanted.keys() - memory.tensors]
  faults += [f"{name} is unknown" for name in memory.tensors.keys() - wanted]
  faults += [
    f"{name} is {header.dtype}{list(header.shape)}, must be "
    f"{wanted[name].dtype}{list(wanted[name].shape)}"
    for name, header in memory.tensors.items()
    if name in wanted and header != wanted[name]
  ]
  if faults:
    raise ConfigError(
      f"{path}: tensors do not fit {SETTINGS}: {'; '.join(sorted(faults))}"
    )
  arrays = {}
  with files_lib.open_safetensors(path) as file:
    for name, place in named.items():
      array = file.get_tensor(name)
      if not _is_finite(array):
        raise ConfigError(f"{path}: {name} is not finite")
      arrays[place] = on_devices(array, places[place].sharding)
  return arrays


def _is_finite(array: np.ndarray) -> bool:
  """Returns whether all numbers are finite, those of bfloat16's bits, too."""
  if array.dtype == np.uint16:
    array = array.view(jnp.bfloat16)
  return bool(np.isfinite(array).all())


def require_backbone(memory: Memory, digest: str, source: str) -> None:
  """Requires a transformer to be the one that the memories were trained in.

  Args:
    memory: of `open_memory`.
    digest: `write.digest` of the transformer.
    source: of the transformer, for the message.
  Raises:
    ConfigError: it is another one.
  """
  if digest != memory.backbone:
    raise ConfigError(
      f"{memory.folder / SETTINGS}: the memory belongs to a model with "
      f"backbone_sha256 = {memory.backbone:.12}...; that of {source} is "
      f"{digest:.12}..."
    )
