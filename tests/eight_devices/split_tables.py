"""A small table on meshes of eight devices, and the same on one."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from ultramem_jax.ops import lookup
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded import lookup as sharded_lookup
from ultramem_jax.settings.config import MESH_AXES
from ultramem_jax.train import mesh as mesh_lib

# Sizes of data, fsdp, tensor and table; the axes that the table is split over.
MESHES = {
  "tokens differ": ((4, 2, 1, 1), ("data", "fsdp")),
  "tokens differ along some": ((2, 2, 2, 1), ("fsdp", "tensor")),
  "copies of the table": ((2, 1, 2, 2), ("tensor", "table")),
  "order of the mesh": ((2, 1, 4, 1), ("data", "tensor")),
  "one device each": ((8, 1, 1, 1), ()),
}
NUM_ROWS, WIDTH, POOLS, READS = 16, 24, 4, 5


def make_layout(mesh, partition, dtype="float32"):
  sizes, axes = MESHES[mesh]
  made = jax.make_mesh(
    sizes, MESH_AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4
  )
  return layout_lib.Layout(
    made,
    mesh_lib.BATCH_AXES,
    mesh_lib.LENGTH_AXES,
    ("table",),
    ("tensor",),
    axes,
    partition,
    dtype,
  )


def inputs(length, num_rows=NUM_ROWS, read_rows=None):
  """All read the first `read_rows` of the rows alone."""
  rng = np.random.default_rng(0)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  shape = (8, length, READS)
  index_BTY = rng.integers(0, POOLS, shape) * num_rows + rng.integers(
    0, read_rows or num_rows, shape
  )
  return (
    draw(num_rows, WIDTH),
    jnp.asarray(index_BTY, jnp.int32),
    draw(*shape, 3),
    draw(8, length, WIDTH),
  )


def both(module, **options):
  """Pooled rows and dots through one scalar, with gradients."""

  def value(table_IW, score_BTYC, x_BTW, index_BTY):
    pooled_BTEW = module.pool_rows(
      table_IW, index_BTY, score_BTYC, POOLS, **options
    )
    dot_BTY = module.dot_rows(
      table_IW, index_BTY % len(table_IW), x_BTW, **options
    )
    return jnp.sin(pooled_BTEW).sum() + jnp.cos(dot_BTY).sum(), (
      pooled_BTEW,
      dot_BTY,
    )

  return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)


def sharded(layout, arguments):
  table = NamedSharding(layout.mesh, layout.table_spec())
  whole = NamedSharding(layout.mesh, jax.sharding.PartitionSpec())
  shardings = (table, whole, whole, whole)
  return jax.jit(both(sharded_lookup, layout=layout), in_shardings=shardings)(
    *arguments
  )


on_one_device = jax.jit(both(lookup))
