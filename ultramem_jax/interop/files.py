"""Loads tensors by name from the files that hold them."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError

# The dtypes of the safetensors format.
SAFETENSORS_DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U8": np.uint8,
  "BOOL": np.bool_,
}


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
    return _load_safetensors(path)
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


def _load_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
  """Reads the length of the header (uint64), the header (JSON), raw bytes."""
  try:
    data = np.memmap(path, np.uint8, mode="r")
    length = int(data[:8].view("<u8")[0])
    header = json.loads(bytes(data[8 : 8 + length]))
    header.pop("__metadata__", None)
    tensors = {}
    for name, tensor in header.items():
      start, end = tensor["data_offsets"]
      raw = data[8 + length + start : 8 + length + end]
      dtype = np.dtype(SAFETENSORS_DTYPES[tensor["dtype"]])
      tensors[name] = np.frombuffer(raw.tobytes(), dtype).reshape(
        tensor["shape"]
      )
  except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
    raise ConfigError(
      f"state_dict = {str(path)!r}: is not a safetensors file that we can "
      f"read ({error!r})"
    ) from error
  return tensors
