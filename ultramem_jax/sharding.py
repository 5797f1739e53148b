"""The device mesh, and where batches and states lie on it."""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ultramem_jax.config import Config, require


def make_mesh(config: Config, devices=None) -> Mesh:
  """The mesh of config.mesh.

  Args:
    config: the run.
    devices: of the mesh; None: all devices of all processes.
  Raises:
    ConfigError: sizes that do not match the devices, or a batch that does not
      divide over them.
  """
  count = jax.device_count() if devices is None else len(devices)
  size = count if config.mesh.data == -1 else config.mesh.data
  require(size == count, "mesh.data", config.mesh.data,
          f"must be -1 or the number of devices, {count}")
  part = config.batch_size // config.accumulation_steps
  require(
      part % size == 0, "batch_size", config.batch_size,
      f"batch_size / accumulation_steps = {part} must be divisible by the "
      f"{size} devices along mesh.data",
  )
  return jax.make_mesh((size,), ("data",), axis_types=(AxisType.Auto,),
                       devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows of a batch are split over the data axis."""
  return NamedSharding(mesh, PartitionSpec("data"))


def replicated(mesh: Mesh) -> NamedSharding:
  """Every device holds the whole array."""
  return NamedSharding(mesh, PartitionSpec())


def process_rows(config: Config) -> range:
  """Rows of a global batch that this process feeds to its devices."""
  rows = config.batch_size // jax.process_count()
  return range(rows * jax.process_index(), rows * (jax.process_index() + 1))


def to_devices(batch, mesh: Mesh):
  """A global device batch from the rows of this process, each [rows, T]."""
  return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


def with_sharding(tree, sharding: NamedSharding):
  """Abstract arrays like those of tree, placed by sharding."""
  return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
  )
