"""Moves tensors of other programs to arrays of ours, and back."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

Path = tuple[str | int, ...]


class Entry(NamedTuple):
  """One tensor and the arrays that hold it.

  With one path, array = tensor.reshape(split).transpose(axes). Where there
  are several, `parts` are the lengths into which the first axis of the reshaped
  tensor is cut; the array at each path is its part, transposed. A path that
  ends in a number is that element of the array at the rest of the path.
  """

  shape: tuple[int, ...]
  split: tuple[int, ...]
  axes: tuple[int, ...]
  paths: tuple[Path, ...]
  parts: tuple[int, ...]

  @property
  def array_shapes(self) -> dict[Path, tuple[int, ...]]:
    """The shape of the array at each path."""
    splits = ((part, *self.split[1:]) for part in self.parts)
    return {
      path: tuple(split[axis] for axis in self.axes)
      for path, split in zip(self.paths, splits, strict=True)
    }

  def to_arrays(self, tensor: np.ndarray) -> dict[Path, np.ndarray]:
    """Returns the arrays, by path, that hold the tensor."""
    ends = np.cumsum(self.parts)[:-1]
    parts = np.split(tensor.reshape(self.split), ends)
    return {
      path: part.transpose(self.axes)
      for path, part in zip(self.paths, parts, strict=True)
    }

  def to_tensor(self, arrays: Mapping[Path, np.ndarray]) -> np.ndarray:
    """Returns the tensor that the arrays at `paths` hold."""
    back = np.argsort(self.axes)
    parts = [arrays[path].transpose(back) for path in self.paths]
    tensor = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return tensor.reshape(self.shape)


def make_entry(
  *paths: Path,
  split: tuple[int, ...],
  axes: tuple[int, ...] | None = None,
  shape: tuple[int, ...] | None = None,
  parts: tuple[int, ...] | None = None,
) -> Entry:
  """Returns an Entry; by default the shape is split, and no axis moves."""
  return Entry(
    split if shape is None else shape,
    split,
    tuple(range(len(split))) if axes is None else axes,
    paths,
    split[:1] if parts is None else parts,
  )


def linear(path: Path, outputs: int, inputs: int) -> Entry:
  """Returns the Entry of a torch weight [out, in], our kernel [in, out]."""
  return make_entry(path, split=(outputs, inputs), axes=(1, 0))
