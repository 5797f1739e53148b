"""Loads tensors by name from the files that hold them, and writes files."""

import contextlib
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors

from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError

# Those of the safetensors format that numpy has, with JAX.
DTYPES = {
  name: np.dtype(dtype)
  for name, dtype in {
    **{"F64": np.float64, "F32": np.float32, "F16": np.float16},
    **{"BF16": jnp.bfloat16, "BOOL": np.bool_},
    **{"I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8},
    **{"U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8},
  }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Header(NamedTuple):
  """What a file says of a tensor; dtype: one of DTYPES."""

  dtype: str
  shape: tuple[int, ...]

  @property
  def num_bytes(self) -> int:
    """The bytes of its content."""
    return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def load(state_dict: Any) -> Mapping[str, np.ndarray]:
  """Returns tensors by name, read from a file where state_dict is a path.

  Args:
    state_dict: the path of a .safetensors or .pt file; anything else is
      returned as it is.
  Raises:
    ConfigError: the path has another suffix, the file is absent or broken, or
      it ends in .pt and torch is not installed.
  """
  if not isinstance(state_dict, str | os.PathLike):
    return state_dict
  path = pathlib.Path(state_dict)
  require(
    path.suffix in (".safetensors", ".pt"),
    "state_dict",
    str(path),
    "must end in .safetensors or .pt",
  )
  require(path.is_file(), "state_dict", str(path), "is not a file")
  if path.suffix == ".safetensors":
    names = headers(path)
    with open_safetensors(path) as file:
      return {name: file.get_tensor(name) for name in names}
  return _load_pt(path)


def _load_pt(path: pathlib.Path) -> dict[str, np.ndarray]:
  try:
    # Optional, and slow to import.
    import torch  # pyright: ignore[reportMissingImports]
  except ImportError as error:
    raise ConfigError(
      f"state_dict = {str(path)!r}: reading .pt needs torch; install it, or "
      "save the tensors as .safetensors"
    ) from error
  try:
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {
      name: (tensor.float() if tensor.is_floating_point() else tensor).numpy()
      for name, tensor in tensors.items()
    }
  except Exception as error:  # from pickle, zipfile or torch, of any class
    raise ConfigError(
      f"state_dict = {str(path)!r}: is not a .pt file of tensors by name "
      f"({error!r:.200})"
    ) from error


def headers(path: pathlib.Path) -> dict[str, Header]:
  """Returns what a .safetensors file says of its tensors, by name.

  Raises:
    ConfigError: the file is broken, or numpy cannot hold a tensor of it.
  """
  with open_safetensors(path) as file:
    slices = {name: file.get_slice(name) for name in file.offset_keys()}
    found = {
      name: Header(x.get_dtype(), tuple(x.get_shape()))
      for name, x in slices.items()
    }
  unknown = [
    f"{name} is {header.dtype}"
    for name, header in found.items()
    if header.dtype not in DTYPES
  ]
  if unknown:
    raise ConfigError(
      f"{str(path)!r}: has dtypes that we cannot read: {'; '.join(unknown)}"
    )
  return found


@contextlib.contextmanager
def open_safetensors(path: pathlib.Path) -> Iterator[Any]:
  """Opens a .safetensors file, which then reads tensors as numpy arrays.

  Raises:
    ConfigError: the file is broken.
  """
  try:
    # Read, not mapped: a page that was mapped would stay in memory.
    with safetensors.safe_open(path, "numpy", backend="pread") as file:
      yield file
  except safetensors.SafetensorError as error:
    raise ConfigError(
      f"{str(path)!r}: is not a safetensors file that we can read ({error})"
    ) from error


def write_safetensors(
  path: pathlib.Path,
  tensors: Mapping[str, Header],
  read: Callable[[str], np.ndarray],
  facts: Mapping[str, str] | None = None,
) -> None:
  """Writes a .safetensors file, one tensor after another, to the disk.

  Args:
    path: of the file.
    tensors: what it holds, by name.
    read: returns the tensor of a name, of that shape and dtype.
    facts: what else its header says.
  """
  # The largest elements first, so that every tensor is aligned.
  names = sorted(tensors, key=lambda x: (-DTYPES[tensors[x].dtype].itemsize, x))
  header: dict[str, Any] = {"__metadata__": {"format": "pt", **(facts or {})}}
  end = 0
  for name in names:
    start, end = end, end + tensors[name].num_bytes
    header[name] = {
      "dtype": tensors[name].dtype,
      "shape": tensors[name].shape,
      "data_offsets": [start, end],
    }
  text = json.dumps(header).encode()
  text += b" " * (-len(text) % 8)
  with open(path, "xb") as file:
    file.write(len(text).to_bytes(8, "little") + text)
    for name in names:
      tensor = np.asarray(read(name), order="C")
      assert tensor.shape == tensors[name].shape
      assert tensor.dtype == DTYPES[tensors[name].dtype]
      file.write(tensor.reshape(-1).view(np.uint8).data)
    file.flush()
    os.fsync(file.fileno())
