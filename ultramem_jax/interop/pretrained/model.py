"""A pretrained model: opened, checked, and read to where its arrays belong."""

import functools
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from ultramem_jax.interop.pretrained import files, names
from ultramem_jax.interop.pretrained.families import FAMILIES, Family, Fields
from ultramem_jax.interop.pretrained.settings import Settings
from ultramem_jax.interop.tensors import Entry, Path
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.json_file import read_mapping
from ultramem_jax.settings.model import ModelConfig

DTYPES = ("F32", "BF16", "F16", "F64")
ROLES = ("bos", "eos", "pad")


class Tensor(Protocol):
  """A tensor that is not read yet: of `files`, or of a GGUF file."""

  @property
  def path(self) -> pathlib.Path: ...
  @property
  def name(self) -> str: ...
  @property
  def dtype(self) -> str: ...
  @property
  def shape(self) -> tuple[int, ...]: ...
  def rows(self) -> Iterator[tuple[slice, np.ndarray]]: ...


class Pretrained(NamedTuple):
  """A pretrained model; of its tensors only headers are read.

  source: the folder, or the file, that a user named.
  folder: with config.json and, if there is one, the tokenizer.
  family: of the model.
  fields: of ModelConfig, that the model decides.
  max_length: positions that it was trained on.
  special_ids: of the tokens "bos", "eos" and "pad", where config.json has them.
  tensors: by name.
  """

  source: pathlib.Path
  folder: pathlib.Path
  family: Family
  fields: Fields
  max_length: int
  special_ids: dict[str, int]
  tensors: Mapping[str, Tensor]


def open_folder(name: str) -> Pretrained:
  """Opens a Hugging Face folder: `config.json` and .safetensors files.

  Raises:
    ConfigError: no such folder, an unknown architecture, settings that we do
      not know or cannot express (all of them are named), or damaged files.
  """
  folder = files.find_folder(name)
  path = folder / files.CONFIG
  values = read_mapping(path)
  find = functools.partial(files.find_tensors, folder)
  return make_pretrained(folder, path, folder, values, find)


def make_pretrained(
  source: pathlib.Path,
  path: pathlib.Path,
  folder: pathlib.Path,
  values: Mapping[str, Any],
  find_tensors: Callable[[], Mapping[str, Tensor]],
) -> Pretrained:
  """Returns a pretrained model of these settings and tensors.

  Args:
    source, folder: of the model.
    path: of the file that says the settings.
    values: the content of `config.json`.
    find_tensors: returns the tensors by name, if the settings are known.
  Raises:
    ConfigError: as `open_folder` does.
  """
  settings = Settings(values)
  named = settings.get("architectures")
  architecture = named[0] if isinstance(named, list) and named else named
  family = FAMILIES.get(architecture) if isinstance(architecture, str) else None
  if family is None:
    raise ConfigError(
      f"{path}: architectures = {named!r}: must be one of {', '.join(FAMILIES)}"
    )
  fields = family.fields(settings)
  length = settings.integer("max_position_embeddings", 2048)
  settings.refuse_others()
  if settings.faults:
    raise ConfigError(f"{path}: {'; '.join(settings.faults)}")
  ids = {}
  for role in ROLES:
    named = settings.get(f"{role}_token_id")
    first = named[0] if isinstance(named, list) and named else named
    # Some models have -1 for none.
    if type(first) is int and 0 <= first < fields["vocab_size"]:
      ids[role] = first
  return Pretrained(source, folder, family, fields, length, ids, find_tensors())


def family_entries(
  c: ModelConfig, settings: Mapping[str, Any]
) -> dict[str, Entry]:
  """Returns the tensors of a model, by name, as its config.json has them."""
  (architecture,) = settings["architectures"]
  return names.model_entries(c, FAMILIES[architecture].norms)


def entries(pretrained: Pretrained, c: ModelConfig) -> dict[str, Entry]:
  """Returns the tensors of a model of these settings, by name.

  Raises:
    ConfigError: the folder lacks one, has others, or some of another shape or
      dtype; all are listed.
  """
  wanted = names.model_entries(c, pretrained.family.norms)
  held = {
    name: tensor
    for name, tensor in pretrained.tensors.items()
    if not re.fullmatch(names.DERIVED, name)
  }
  known = wanted
  if c.tie_embeddings and names.HEAD in held:  # a file may hold it, too
    known = {**wanted, names.HEAD: wanted[names.EMBEDDING]}
  faults = tensor_faults(known, held)
  if faults:
    raise ConfigError(
      f"{pretrained.source}: tensors do not fit its settings: "
      f"{'; '.join(faults)}"
    )
  return wanted


def tensor_faults(
  wanted: Mapping[str, Entry], tensors: Mapping[str, Tensor]
) -> list[str]:
  """Returns what keeps tensors from being those wanted, one text for each."""
  faults = [f"{name} is missing" for name in wanted if name not in tensors]
  for name, tensor in tensors.items():
    if name not in wanted:
      faults.append(f"{name} is unknown")
    elif tensor.shape != wanted[name].shape:
      shapes = list(tensor.shape), list(wanted[name].shape)
      faults.append(f"{name} has shape {shapes[0]}, must be {shapes[1]}")
    elif tensor.dtype not in DTYPES:
      faults.append(f"{name} is {tensor.dtype}, must be {', '.join(DTYPES)}")
  return faults


def read_params(
  pretrained: Pretrained,
  c: ModelConfig,
  shardings: Mapping[Path, jax.sharding.Sharding],
) -> dict[Path, jax.Array]:
  """Reads the parameters, one by one, to the devices where they belong.

  Beside the parameters, this machine holds one of them, and a part of another.

  Args:
    pretrained: the folder.
    c: the model, of `pretrained.fields`.
    shardings: of each parameter, by its path.
  Returns:
    The parameters by path, float32.
  Raises:
    ConfigError: of `entries`; a tied head is not the embedding; or a weight is
      not finite.
  """
  params = {}
  for name, entry in entries(pretrained, c).items():
    (path,) = entry.paths
    array = read_array(pretrained.tensors[name], entry)
    head = pretrained.tensors.get(names.HEAD)
    if name == names.EMBEDDING and c.tie_embeddings and head:
      _require_tied(head, array)
    params[path] = on_devices(array, shardings[path])
  return params


def on_devices(array: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
  """Returns an array of this machine, split over devices; it may be freed."""
  return jax.block_until_ready(
    jax.make_array_from_callback(array.shape, sharding, array.__getitem__)
  )


def read_array(tensor: Tensor, entry: Entry) -> np.ndarray:
  """Returns the array that a tensor holds, float32.

  Raises:
    ConfigError: a number is not finite.
  """
  (path,) = entry.paths
  array = np.empty(entry.array_shapes[path], np.float32)
  as_stored = array.transpose(np.argsort(entry.axes))
  as_stored = np.reshape(as_stored, entry.shape, copy=False)
  for rows, part in tensor.rows():
    as_stored[rows] = part
    if not np.isfinite(as_stored[rows]).all():
      raise ConfigError(f"{tensor.path}: {tensor.name} is not finite")
  return array


def _require_tied(head: Tensor, array: np.ndarray) -> None:
  """Requires the head of a model that has none to be its embedding."""
  for rows, part in head.rows():
    if not np.array_equal(part.astype(np.float32), array[rows]):
      raise ConfigError(
        f"{head.path}: {head.name} is not {names.EMBEDDING}, although "
        "tie_word_embeddings is true"
      )
