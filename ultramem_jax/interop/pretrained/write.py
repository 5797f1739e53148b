"""Writes the parameters of a transformer as files of a Hugging Face folder."""

import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ultramem_jax.interop import files as files_lib
from ultramem_jax.interop.files import Header
from ultramem_jax.interop.pretrained import files, names
from ultramem_jax.interop.tensors import Entry, Path
from ultramem_jax.settings.errors import ConfigError

# Dtypes that a user may ask for, and their names in files.
ASKED = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# What a file holds at most, unless a tensor is larger.
FILE_BYTES = 5 * 10**9


class Backbone(NamedTuple):
  """The tensors of a transformer without its memories, to be written.

  entries: of all tensors, by name.
  params: the parameters by path; others may be there.
  dtypes: of each tensor in the file, one of `files.DTYPES`, by name.
  """

  entries: Mapping[str, Entry]
  params: Mapping[Path, Any]
  dtypes: Mapping[str, str]

  def headers(self) -> dict[str, Header]:
    """Returns what the files say of the tensors."""
    return {
      name: Header(self.dtypes[name], entry.shape)
      for name, entry in self.entries.items()
    }

  def tensor(self, name: str) -> np.ndarray:
    """Returns a tensor as it is written.

    Raises:
      ConfigError: a number is too large for its dtype.
    """
    entry = self.entries[name]
    arrays = {path: np.asarray(self.params[path]) for path in entry.paths}
    exact = entry.to_tensor(arrays)
    with np.errstate(over="ignore"):
      tensor = exact.astype(files_lib.DTYPES[self.dtypes[name]])
    if not np.isfinite(tensor.astype(np.float32)).all():
      raise ConfigError(f"{name} has numbers that {self.dtypes[name]} lacks")
    return tensor

  def digest(self) -> str:
    """Returns the `digest` of the tensors as they are written."""
    return digest((name, self.tensor(name)) for name in self.entries)

  def rounded_digest(self) -> str:
    """Returns the `digest` of the tensors in bfloat16.

    It is the same where a run keeps them so (`optim.frozen_dtype`).
    """
    return self._replace(dtypes=dict.fromkeys(self.entries, "BF16")).digest()


def digest(tensors: Iterable[tuple[str, np.ndarray]]) -> str:
  """Returns the sha256 of tensors by name, whatever their order and dtype.

  Args:
    tensors: of any dtype that float32 holds, one at a time.
  """
  lines = []
  for name, tensor in tensors:
    content = np.ascontiguousarray(tensor, np.float32).data
    held = hashlib.sha256(content).hexdigest()
    lines.append(f"{name} {list(tensor.shape)} {held}\n")
  return hashlib.sha256("".join(sorted(lines)).encode()).hexdigest()


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
  """Writes a mapping as a JSON file."""
  path.write_text(json.dumps(content, indent=2) + "\n")


def write_backbone(
  folder: pathlib.Path, backbone: Backbone, settings: Mapping[str, Any]
) -> None:
  """Writes `config.json`, and `model.safetensors` or several and an index.

  Args:
    folder: which exists.
    backbone: the tensors; this machine holds one of them at a time.
    settings: of `config_json.make_settings`.
  """
  headers = backbone.headers()
  dtype = files_lib.DTYPES[backbone.dtypes[names.EMBEDDING]].name
  said = {"dtype": dtype, "torch_dtype": dtype}
  write_json(folder / files.CONFIG, {**settings, **said})
  groups: list[list[str]] = [[]]
  size = 0
  for name, header in headers.items():
    if size + header.num_bytes > FILE_BYTES and groups[-1]:
      groups.append([])
      size = 0
    groups[-1].append(name)
    size += header.num_bytes
  count, places = len(groups), {}
  for number, group in enumerate(groups, 1):
    file = files.SINGLE
    if count > 1:
      file = f"model-{number:05d}-of-{count:05d}.safetensors"
    places |= dict.fromkeys(group, file)
    held = {name: headers[name] for name in group}
    files_lib.write_safetensors(folder / file, held, backbone.tensor)
  if count > 1:
    total = sum(header.num_bytes for header in headers.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / files.INDEX, index)
