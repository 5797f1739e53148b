"""Where parameters, states and batches lie on the mesh of `train.mesh`."""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ultramem_jax.model import Transformer
from ultramem_jax.ops.sharded import lookup as sharded_lookup
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import MESH_AXES, Config
from ultramem_jax.settings.model import ModelConfig
from ultramem_jax.train import mesh as mesh_lib

# The mesh axis of each logical axis of a parameter; others are not split. Value
# tables are split on "rows" or on "columns", over mesh.table_axes.
RULES = {
  "embed": ("fsdp",),
  "mlp": ("tensor",),
  "heads": ("tensor",),
  "kv_heads": ("tensor",),
  "vocab": ("tensor",),
  "experts": ("table",),
  "keys": ("fsdp",),
}
# Axes whose sizes are what a published model has, such as twice a prime of
# keys: devices that do not divide one all hold the whole of it.
UNEVEN = {"kv_heads", "vocab", "keys"}


def table_volumes(config: Config, shards: int) -> dict[str, float]:
  """Returns the bytes a device receives per token in each possible partition.

  They are those of the forward pass, for the table that is pooled; a second one
  (PEER's, pre-values) lies as that does.
  """
  memory = config.model.memory
  volumes = {
    partition: sharded_lookup.bytes_moved(
      partition,
      shards,
      reads=memory.reads,
      width=memory.value_dim,
      cores=memory.num_cores,
      pools=memory.projections,
      itemsize=jnp.dtype(config.model.dtype).itemsize,
    )
    for partition in sharded_lookup.PARTITIONS
  }
  if memory.stored_rows % shards:
    del volumes["rows_pooled"], volumes["rows_unpooled"]
  if (
    memory.value_dim % shards
    or memory.pre_value_dim % shards
    or config.optim.table_second_moment == "row"
  ):
    del volumes["columns"]
  return volumes


def make_layout(config: Config, mesh: Any) -> Layout:
  """Returns how the run's tokens and tables are split over its mesh.

  Args:
    config: the run.
    mesh: a Mesh; an AbstractMesh will do where nothing is placed on devices.
  Raises:
    ConfigError: the tables do not divide over the mesh.
  """
  named = config.mesh.table_axes.split(",")
  axes = tuple(axis for axis in MESH_AXES if axis in named)
  shards = math.prod(mesh.shape[axis] for axis in axes)
  memory = config.model.memory
  volumes = table_volumes(config, shards)
  possible = [
    name
    for name in sorted(volumes, key=lambda name: volumes[name])
    if memory.storage.partition == "auto"
    or name.startswith(memory.storage.partition)
    # Rows that are fetched by parts are read by XLA.
    if memory.storage.kernel == "xla" or name != "rows_unpooled" or shards == 1
  ]
  require(
    bool(possible) or not config.model.spans,
    "model.memory.storage.partition",
    memory.storage.partition,
    f"{shards} devices share the tables (mesh.table_axes). To split rows, "
    f"they must divide the {memory.stored_rows} rows, as they do with "
    f"row_multiple = {shards}; rows_unpooled needs kernel = 'xla'. To split "
    f"columns, they must divide value_dim = {memory.value_dim} and "
    f"pre_value_dim = {memory.pre_value_dim}, and optim.table_second_moment "
    "must be 'element'",
  )
  partition = possible[0] if possible else ""
  return Layout(
    mesh,
    mesh_lib.BATCH_AXES,
    mesh_lib.LENGTH_AXES,
    RULES["experts"],
    RULES["mlp"],
    axes,
    partition,
    config.model.dtype if shards > 1 else "float32",
  )


def describe(config: Config, layout: Layout) -> str:
  """Returns one line: the mesh, and how the tables are split and why."""
  mesh = ", ".join(f"{axis} {size}" for axis, size in layout.mesh.shape.items())
  shards = layout.size(layout.table_axes)
  if not config.model.spans or shards == 1:
    idle = layout.mesh.shape["table"] > 1 and not config.model.spans
    if idle and not config.model.moe.num_experts:
      mesh += " (splits nothing: there are no tables and no experts)"
    return f"mesh: {mesh}"
  volumes = ", ".join(
    f"{name} {volume / 1e3:.1f}"
    for name, volume in table_volumes(config, shards).items()
  )
  return (
    f"mesh: {mesh}; tables split over {shards} devices: {layout.partition} "
    f"(kB a token moves forward: {volumes})"
  )


@functools.lru_cache(maxsize=128)
def parameter_axes(model: ModelConfig) -> dict[str, tuple]:
  """Returns (logical name, size) of each axis of every parameter, by path.

  A path is joined by "/": "block_0/mlp/up/kernel". Nothing is allocated.
  """
  # Rematerialization changes no shape, and doubles the time of tracing.
  model = dataclasses.replace(model, remat="none")
  # Made while tracing, a key needs no device.
  variables = jax.eval_shape(
    lambda tokens_BT: Transformer(model).init(jax.random.key(0), tokens_BT),
    jax.ShapeDtypeStruct((1, 1), jnp.int32),
  )
  names: dict[Any, Any] = traverse_util.flatten_dict(
    nn.get_partition_spec(variables["params"]), sep="/"
  )
  params: dict[Any, Any] = traverse_util.flatten_dict(
    nn.meta.unbox(variables["params"]), sep="/"
  )
  return {
    path: tuple(zip(names[path], leaf.shape, strict=True))
    for path, leaf in params.items()
  }


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """Returns the shape of each parameter by path: "block_0/mlp/up/kernel"."""
  return {
    path: tuple(size for _, size in axes)
    for path, axes in parameter_axes(model).items()
  }


def parameter_specs(config: Config, layout: Layout) -> dict[str, PartitionSpec]:
  """Returns the split of every parameter, by path as `parameter_axes` has it.

  Raises:
    ConfigError: an axis of a parameter that its devices do not divide.
  """
  model = config.model
  table = "columns" if layout.partition == "columns" else "rows"
  rules = {**RULES, table: layout.table_axes}
  # Models with grouped heads may have any number of them: SmolLM2-135M has 9.
  grouped = model.num_kv_heads < model.num_heads
  uneven = UNEVEN | ({"heads"} if grouped else set())

  def place(path, name, size):
    axes = rules.get(name, ())
    devices = layout.size(axes)
    if name in uneven and size % devices:
      return None
    if name != table:  # that one is `make_layout`'s to check
      require(
        size % devices == 0,
        f"mesh.{axes[0] if axes else ''}",
        devices,
        f"must divide {size}, the size of {name!r} in {path}",
      )
    return axes if devices > 1 else None

  specs = {}
  for path, axes in parameter_axes(model).items():
    # A vector is not worth splitting.
    placed = [place(path, *axis) for axis in axes] if len(axes) > 1 else []
    specs[path] = PartitionSpec(*placed)
  return specs


def state_shardings(state: Any, config: Config, layout: Layout) -> Any:
  """Returns the sharding of every array of a state, or of a part of one.

  An array whose path ends with that of a parameter, such as its moments, is
  split as the parameter is, in the axes that it has in common with it; tables
  and their moments as the parameter that the path of the table names; row
  counters as the tables are; everything else is held by every device.

  Args:
    state: pytree of arrays or abstract arrays, such as an abstract TrainState.
    config: the run.
    layout: of `make_layout`.
  Raises:
    ConfigError: of `parameter_specs`.
  """
  specs = parameter_specs(config, layout)
  shapes = parameter_shapes(config.model)

  def sharding(path, leaf):
    names = tuple(
      str(getattr(key, "key", getattr(key, "name", key))) for key in path
    )
    if names[0] in ("usage", "seen"):
      return counter_sharding(layout, leaf.size)
    spec = PartitionSpec()
    if names[0] == "tables":
      names = (names[1],)
    for start in range(len(names)):
      name = "/".join(names[start:])
      if name in specs:
        spec = PartitionSpec(
          *(
            axes if held == size else None
            for axes, size, held in zip(
              specs[name], shapes[name], leaf.shape, strict=False
            )
          )
        )
        break
    return NamedSharding(layout.mesh, spec)

  return jax.tree_util.tree_map_with_path(sharding, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that splits rows of a batch over `mesh.BATCH_AXES`."""
  return NamedSharding(mesh, PartitionSpec(mesh_lib.BATCH_AXES))


def counter_sharding(layout: Layout, size: int) -> NamedSharding:
  """Returns the sharding of an array with a number for each row of a table."""
  axes = layout.dividing(layout.table_axes, size)
  return NamedSharding(layout.mesh, PartitionSpec(axes))


def replicated(mesh: Mesh) -> NamedSharding:
  """Returns the sharding that holds the whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def process_rows(config: Config, mesh: Mesh) -> list[int]:
  """Returns the rows of a global batch that this process's devices hold.

  Processes whose devices differ in other axes than the batch's hold, and so
  feed, the same rows.

  Raises:
    ConfigError: on all processes, if two hold some of the same rows, not all.
  """
  held: Any = batch_sharding(mesh).devices_indices_map((config.batch_size,))
  rows = range(config.batch_size)
  of_process = {}
  for device, (part,) in held.items():
    of_process.setdefault(device.process_index, set()).update(rows[part])
  kinds = {frozenset(x) for x in of_process.values()}
  require(
    sum(map(len, kinds)) == len(frozenset().union(*kinds)),
    "mesh.data",
    mesh.shape["data"],
    "splits the batch so that processes share some of their rows, not all: "
    "tensor * table and the devices of a process must divide one another",
  )
  return sorted(of_process[jax.process_index()])


def to_devices(batch: Any, mesh: Mesh) -> Any:
  """Makes the global batch on the devices from this process's [rows, T]."""
  return jax.make_array_from_process_local_data(batch_sharding(mesh), batch)


def with_sharding(tree: Any, shardings: Any) -> Any:
  """Returns abstract arrays like those of tree, placed by one or a tree."""
  if isinstance(shardings, NamedSharding):
    shardings = jax.tree.map(lambda _: shardings, tree)
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    tree,
    shardings,
  )


def device_bytes(tree: Any) -> int:
  """Returns the bytes that each device holds of a tree of placed arrays."""
  return sum(
    math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )


def shardings_of(tree: Any) -> Any:
  """Returns the shardings of a tree of arrays or placed abstract arrays."""
  return jax.tree.map(lambda x: x.sharding, tree)
