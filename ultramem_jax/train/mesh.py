"""The mesh of devices that `config.mesh` describes.

data and fsdp split the batch; fsdp also splits weights, which are gathered
where they are used; tensor splits the inside of attention, MLP and vocabulary;
table splits experts and value tables, of which a token uses a small part. Value
tables are split over all axes that mesh.table_axes names.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from ultramem_jax.runs import distributed
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import MESH_AXES, Config
from ultramem_jax.settings.errors import ConfigError, first_line

BATCH_AXES = ("data", "fsdp")
LENGTH_AXES = ("tensor", "table")


def shape(config: Config, num_devices: int) -> dict[str, int]:
  """Returns how many of num_devices lie along each axis of config.mesh.

  Raises:
    ConfigError: sizes that do not match the devices, or a batch that does not
      divide over them.
  """
  sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
  rest = math.prod(sizes[axis] for axis in MESH_AXES[1:])
  if sizes["data"] == -1:
    require(
      num_devices % rest == 0,
      "mesh.data",
      -1,
      f"fsdp * tensor * table = {rest} must divide the number of "
      f"devices, {num_devices}",
    )
    sizes["data"] = num_devices // rest
  product = math.prod(sizes.values())
  require(
    product == num_devices,
    "mesh.data",
    sizes["data"],
    f"data * fsdp * tensor * table = {product} must be the number of "
    f"devices, {num_devices}; with data = -1 it is",
  )
  part = config.batch_size // config.accumulation_steps
  split = math.prod(sizes[axis] for axis in BATCH_AXES)
  require(
    part % split == 0,
    "batch_size",
    config.batch_size,
    f"batch_size / accumulation_steps = {part} must be divisible by the "
    f"{split} devices along mesh.data and mesh.fsdp",
  )
  return sizes


def make(config: Config, devices: Sequence[Any] | None = None) -> Mesh:
  """Makes the mesh of config.mesh.

  Args:
    config: the run.
    devices: of the mesh; None: all devices of all processes.
  Raises:
    ConfigError: of `shape`, no GPUs for attention = "cudnn", no device at
      all, or devices of which there is no such mesh.
  """
  devices = distributed.devices() if devices is None else devices
  platform = devices[0].platform
  require(
    config.model.attention == "xla" or platform == "gpu",
    "model.attention",
    config.model.attention,
    f"needs GPUs; the devices are of {platform}",
  )
  sizes = shape(config, len(devices))
  return Mesh(
    _arranged(sizes, devices),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def _arranged(sizes: dict[str, int], devices: Sequence[Any]) -> np.ndarray:
  """Returns devices as an array of a mesh's shape, neighbours close together.

  GPUs lie in their order, in which those of a host stand together. A mesh of
  TPUs follows their torus, of which it may split a dimension; where several
  slices, tori of their own, are joined by a slower network, the batch is split
  over them.

  Raises:
    ConfigError: slices that mesh.data and mesh.fsdp do not split, or TPUs of
      which JAX makes no such mesh.
  """
  count = len({getattr(device, "slice_index", 0) for device in devices})
  between = [1] * len(sizes)  # slices along each axis
  if devices[0].platform == "tpu" and count > 1:
    left = count
    for axis in BATCH_AXES:
      place = MESH_AXES.index(axis)
      between[place] = math.gcd(sizes[axis], left)
      left //= between[place]
    require(
      left == 1,
      "mesh.data",
      sizes["data"],
      f"data * fsdp must be a multiple of the {count} slices of the TPUs",
    )
  within = [x // y for x, y in zip(sizes.values(), between, strict=True)]
  try:
    if max(between) > 1:
      return mesh_utils.create_hybrid_device_mesh(
        within, between, devices, allow_split_physical_axes=True
      )
    return mesh_utils.create_device_mesh(
      within, devices, allow_split_physical_axes=True
    )
  except (ValueError, AssertionError, NotImplementedError) as error:
    raise ConfigError(
      f"mesh = {sizes}: JAX finds no place for it on these devices "
      f"({first_line(error)}); choose other sizes"
    ) from error
