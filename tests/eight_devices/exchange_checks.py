"""Sharded lookups against one device's; run by tests/eight_devices_test.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close
from jax.sharding import NamedSharding

from ultramem_jax import hlo, sharding
from ultramem_jax import layout as layout_lib
from ultramem_jax.ops import exchange, fetch, lookup

# Sizes of data, fsdp, tensor and table; the axes that the table is split over.
MESHES = {
    "tokens differ": ((4, 2, 1, 1), ("data", "fsdp")),
    "tokens differ along some": ((2, 2, 2, 1), ("fsdp", "tensor")),
    "copies of the table": ((2, 1, 2, 2), ("tensor", "table")),
    "order of the mesh": ((2, 1, 4, 1), ("data", "tensor")),
    "one device each": ((8, 1, 1, 1), ()),
}
NUM_ROWS, WIDTH, BLOCKS, READS = 16, 24, 4, 5


def make_layout(mesh, partition, dtype="float32"):
  sizes, axes = MESHES[mesh]
  made = jax.make_mesh(
      sizes, sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
  return layout_lib.Layout(
      made, sharding.BATCH_AXES, sharding.LENGTH_AXES, ("table",), ("tensor",),
      axes, partition, dtype)


def inputs(length, skewed=False):
  rng = np.random.default_rng(0)
  high = 2 if skewed else BLOCKS * NUM_ROWS  # all read two rows of one device
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  shape = (8, length, READS)
  index_BTK = jnp.asarray(rng.integers(0, high, shape), jnp.int32)
  return (draw(NUM_ROWS, WIDTH), index_BTK, draw(*shape, 3),
          draw(8, length, WIDTH))


def both(module):
  """Pooled rows and dots through one scalar, with gradients."""

  def value(table_IW, score_BTKC, x_BTW, index_BTK):
    pooled_BTEW = module.pool_rows(table_IW, index_BTK, score_BTKC, BLOCKS)
    dot_BTK = module.dot_rows(table_IW, index_BTK % NUM_ROWS, x_BTW)
    return jnp.sin(pooled_BTEW).sum() + jnp.cos(dot_BTK).sum(), (
        pooled_BTEW, dot_BTK)

  return jax.value_and_grad(value, argnums=(0, 1, 2), has_aux=True)


def sharded(layout, arguments):
  table = NamedSharding(layout.mesh, layout.table_spec())
  whole = NamedSharding(layout.mesh, jax.sharding.PartitionSpec())
  shardings = (table, whole, whole, whole)
  with layout_lib.using(layout):
    return jax.jit(both(exchange), in_shardings=shardings)(*arguments)


@pytest.mark.parametrize("partition", exchange.PARTITIONS)
@pytest.mark.parametrize("mesh, length", [
    *((mesh, 4) for mesh in MESHES), ("copies of the table", 6),
    ("order of the mesh", 6),
])
def test_values_and_gradients_equal_one_device(mesh, length, partition):
  # 6 positions do not divide over four devices, which then hold the same ones.
  table_IW, index_BTK, score_BTKC, x_BTW = inputs(length)
  arguments = (table_IW, score_BTKC, x_BTW, index_BTK)
  assert_close(
      sharded(make_layout(mesh, partition), arguments),
      jax.jit(both(lookup))(*arguments),
  )


def test_every_row_comes_however_skewed_the_reads():
  table_IW, index_BTK, score_BTKC, x_BTW = inputs(8, skewed=True)
  arguments = (table_IW, score_BTKC, x_BTW, index_BTK)
  # One of 8 devices holds all that is read: several rounds.
  assert 5 * 8 > 1.25 * 5 + 8
  assert_close(
      sharded(make_layout("tokens differ", "rows_unpooled"), arguments),
      jax.jit(both(lookup))(*arguments),
  )


@pytest.mark.parametrize("partition", exchange.PARTITIONS)
def test_bfloat16_travels_and_integer_tables_are_read(partition):
  table_IW, index_BTK, score_BTKC, _ = inputs(4)
  bits_IW = jax.lax.bitcast_convert_type(
      table_IW.astype(jnp.bfloat16), jnp.uint16)
  layout = make_layout("tokens differ", partition, "bfloat16")
  with layout_lib.using(layout):
    pooled = jax.jit(lambda *args: exchange.pool_rows(*args, BLOCKS))(
        bits_IW, index_BTK, score_BTKC)
  expected = lookup.pool_rows(bits_IW, index_BTK, score_BTKC, BLOCKS)
  assert_close(pooled, expected, "bfloat16")


@pytest.mark.parametrize("partition", exchange.PARTITIONS)
def test_compiled_forwards_move_what_the_formulas_say(partition):
  layout = make_layout("one device each", partition)
  layout = dataclasses.replace(layout, table_axes=("data",))
  tokens, reads, width, cores = 32, 20, 64, 2
  split = NamedSharding(layout.mesh, layout.tokens(8, tokens))
  table = NamedSharding(layout.mesh, layout.table_spec())
  arguments = [
      jax.ShapeDtypeStruct(shape, dtype, sharding=placed)
      for shape, dtype, placed in (
          ((64, width), jnp.float32, table),
          ((8, tokens, reads), jnp.int32, split),
          ((8, tokens, reads, cores), jnp.float32, split),
      )
  ]
  with layout_lib.using(layout):
    lowered = jax.jit(
        lambda *args: exchange.pool_rows(*args, BLOCKS), out_shardings=split
    ).lower(*arguments)
  found = hlo.Program(lowered.compile().as_text()).collectives(8)
  received = sum(collective.received for collective in found) / tokens
  expected = exchange.bytes_moved(
      partition, 8, reads=reads, width=width, cores=cores, blocks=BLOCKS,
      itemsize=4)
  # Unpooled rows have room to spare, and agree on the number of rounds.
  room = (fetch.SLACK * tokens * reads / 8 + 8) / (tokens * reads / 8)
  most = room if partition == "rows_unpooled" else 1
  assert 0.999 * expected <= received <= 1.001 * most * expected + 1


@pytest.mark.parametrize("mesh", MESHES)
def test_rows_are_counted_where_they_lie(mesh):
  rng = np.random.default_rng(0)
  slot_BTK = rng.integers(0, 65, (8, 4, 5)).astype(np.int32)  # 64: past the end
  layout = make_layout(mesh, "columns")
  sharding_S = NamedSharding(
      layout.mesh, jax.sharding.PartitionSpec(layout.table_axes))
  with layout_lib.using(layout):
    count_S = jax.jit(lambda *args: exchange.count_rows(*args))(
        jax.device_put(jnp.ones(64, jnp.int32), sharding_S), slot_BTK)
  expected_S = 1 + np.bincount(slot_BTK.reshape(-1), minlength=65)[:64]
  np.testing.assert_array_equal(count_S, expected_S)
  assert count_S.sharding.is_equivalent_to(sharding_S, 1)
