"""Tests of the rules that place arrays on a mesh; no devices are needed."""

import itertools

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from ultramem_jax import testing
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.train import sharding
from ultramem_jax.train import state as state_lib


def layout(config, num_devices=8):
  sizes = sharding.mesh_shape(config, num_devices)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  return sharding.make_layout(config, mesh)


def specs(config):
  """{"path": its split} of every parameter that is split."""
  found = sharding.parameter_specs(config, layout(config))
  return {path: tuple(spec) for path, spec in found.items() if any(spec)}


FSDP, TENSOR = "fsdp", "tensor"
TABLE = ("fsdp", "tensor", "table")


def test_where_every_parameter_lies():
  config = testing.small_config(
    batch_size=8,
    model__num_layers=1,
    model__memory__spans="1:1",
    mesh__fsdp=2,
    mesh__tensor=2,
    mesh__table=2,
    model__memory__storage__partition="rows",
  )
  expected = {
    "embed/embedding": (TENSOR, FSDP),
    "block_0/attention/query/kernel": (FSDP, TENSOR, None),
    "block_0/attention/key/kernel": (FSDP, TENSOR, None),
    "block_0/attention/value/kernel": (FSDP, TENSOR, None),
    "block_0/attention/out/kernel": (TENSOR, None, FSDP),
    "block_0/mlp/up/kernel": (FSDP, TENSOR),
    "block_0/mlp/down/kernel": (TENSOR, FSDP),
    "memory_0/keys": (None, None, None, FSDP, None),
    "memory_0/query": (FSDP, None, None, None, None),
    "memory_0/query_conv/kernel": (None, FSDP),
    "memory_0/value_projection": (None, None, FSDP),
    "memory_0/values": (TABLE, None),
    "head/kernel": (FSDP, TENSOR),
  }
  assert specs(config) == expected
  columns = testing.small_config(
    batch_size=8,
    model__num_layers=1,
    model__memory__spans="1:1",
    mesh__data=2,
    mesh__fsdp=2,
    mesh__tensor=2,
    mesh__table_axes="tensor,data",
    model__memory__storage__partition="columns",
  )
  # In the order of the mesh, in whatever order they are named.
  assert specs(columns) == expected | {
    "memory_0/values": (None, ("data", "tensor"))
  }


@pytest.mark.parametrize("kv_heads, split", [(4, TENSOR), (2, None)])
def test_what_a_published_model_has_too_few_of_is_whole(kv_heads, split):
  """A vocabulary, and heads of keys, which 4 devices may not divide."""
  config = testing.small_config(
    batch_size=8,
    mesh__fsdp=2,
    mesh__tensor=4,
    model__memory__kind="none",
    model__num_layers=1,
    model__num_heads=8,
    model__num_kv_heads=kv_heads,
    model__qkv_bias=True,
    model__vocab_size=261,
  )
  found = specs(config)
  assert found["embed/embedding"] == (None, FSDP)
  assert found["head/kernel"] == (FSDP, None)
  assert found["block_0/attention/query/kernel"] == (FSDP, TENSOR, None)
  assert found["block_0/attention/query/bias"] == (TENSOR, None)
  for name in ("key", "value"):
    assert found[f"block_0/attention/{name}/kernel"] == (FSDP, split, None)
    assert found.get(f"block_0/attention/{name}/bias", (None, None)) == (
      split,
      None,
    )


def test_grouped_heads_that_no_devices_divide_are_whole():
  """As the nine of SmolLM2-135M; the rest of the model is split."""
  config = testing.small_config(
    batch_size=8,
    mesh__tensor=2,
    model__memory__kind="none",
    model__num_layers=1,
    model__num_heads=9,
    model__num_kv_heads=3,
    model__head_dim=4,
  )
  assert set(specs(config)) == {
    "embed/embedding",
    "block_0/mlp/up/kernel",
    "block_0/mlp/down/kernel",
    "head/kernel",
  }


def test_experts_lie_on_the_table_axis():
  config = testing.small_config(
    batch_size=8,
    mesh__table=2,
    mesh__tensor=2,
    model__num_layers=1,
    model__memory__kind="none",
    model__moe__num_experts=4,
  )
  moe = {
    path.removeprefix("block_0/moe/"): spec
    for path, spec in specs(config).items()
    if "moe" in path
  }
  assert moe == {
    "experts_up": ("table", None, TENSOR),
    "experts_down": ("table", TENSOR, None),
  }


def test_moments_lie_as_their_parameter_and_counters_as_the_tables():
  # 81 rows and 324 slots, of which 8 devices divide neither.
  config = testing.small_config(
    batch_size=8,
    mesh__fsdp=2,
    mesh__table=4,
    model__memory__storage__partition="rows",
    model__memory__num_keys=9,
    model__memory__storage__row_multiple=8,
  )
  state = state_lib.abstract_state(config, layout(config))
  # Values, means and variances.
  tables = [
    leaf.sharding.spec
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if "['memory_0/values']" in jax.tree_util.keystr(path)
  ]
  assert len(tables) == 3 and {tuple(spec) for spec in tables} == {
    (TABLE, None)
  }
  for reads in (state.usage["memory_0"], state.seen["memory_0"]):
    assert {tuple(x.sharding.spec) for x in reads} == {(TABLE,)}
  whole = jax.tree.leaves((state.step, state.key, state.buffers))
  assert {tuple(leaf.sharding.spec) for leaf in whole} == {()}


BAD = {
  # Sizes that do not match the 8 devices.
  "mesh.data = -1: fsdp * tensor * table = 3 must divide the number of "
  "devices, 8": {"mesh__fsdp": 3},
  "mesh.data = 2: data * fsdp * tensor * table = 4 must be the number of "
  "devices, 8": {"mesh__data": 2, "mesh__tensor": 2},
  # The batch does not divide.
  "batch_size = 4: batch_size / accumulation_steps = 4 must be divisible by "
  "the 8 devices": {},
  # A weight does not divide.
  "mesh.tensor = 8: must divide 2, the size of 'heads'": {
    "mesh__tensor": 8,
    "mesh__table_axes": "data",
  },
  # Tables: 8^2 rows of width 8, then 9^2 rows of width 6.
  "model.memory.storage.partition = 'rows': 8 devices share the tables": {
    "mesh__table": 8,
    "model__memory__num_keys": 9,
    "model__memory__storage__partition": "rows",
  },
  "To split rows, they must divide the 81 rows, as they do with row_multiple = "
  "8; rows_unpooled needs kernel = 'xla'. To split columns, they must divide "
  "value_dim = 6 and": {
    "mesh__table": 8,
    "model__memory__num_keys": 9,
    "model__memory__value_dim": 6,
  },
  "model.memory.storage.partition = 'rows_unpooled': 8 devices share": {
    "mesh__table": 8,
    "model__memory__storage__partition": "rows_unpooled",
    "model__memory__storage__kernel": "pallas",
  },
  "model.memory.storage.partition = 'columns': 8 devices share": {
    "mesh__table": 8,
    "model__memory__value_dim": 12,
    "model__memory__storage__partition": "columns",
  },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_meshes_are_told_in_one_line(message):
  with pytest.raises(ConfigError) as error:
    config = testing.small_config(**BAD[message])
    sharding.parameter_specs(config, layout(config))
  assert message in str(error.value) and "\n" not in str(error.value)


def test_auto_takes_what_divides_and_moves_least():
  many = {"batch_size": 8, "mesh__table": 8, "model__memory__top_m": 8}
  # 16 rows of 8 values: their indices cost more than the rows themselves.
  assert layout(testing.small_config(**many)).partition == "rows_unpooled"
  wide = testing.small_config(**many, model__memory__value_dim=512)
  assert layout(wide).partition == "columns"
  odd = testing.small_config(
    **many, model__memory__value_dim=510, model__memory__num_cores=2
  )
  assert layout(odd).partition == "rows_unpooled"
  line = sharding.describe(wide, layout(wide))
  assert "\n" not in line
  assert "tables split over 8 devices: columns (kB a token moves forward" in (
    line
  )


def test_flash_attention_needs_gpus():
  config = testing.small_config(
    model__attention="cudnn", model__dtype="bfloat16"
  )
  with pytest.raises(ConfigError, match="attention = 'cudnn': needs GPUs"):
    sharding.make_mesh(config)


class Device:
  """A device of several hosts, as far as a mesh asks about it."""

  core_on_chip = 0

  def __init__(self, number, kind, process, slice_index=0, coords=(0, 0, 0)):
    self.id, self.process_index = number, process
    self.device_kind, self.slice_index, self.coords = kind, slice_index, coords
    self.platform = "tpu" if kind.startswith("TPU") else "gpu"


def gpus(hosts, of_each):
  """JAX calls every host of GPUs a slice."""
  return [
    Device(i, "NVIDIA H100 80GB HBM3", i // of_each, i // of_each)
    for i in range(hosts * of_each)
  ]


def tpus(kind, *sides, slices=1):
  """Slices of a torus [x, y, z], with four chips to a host."""
  places = list(itertools.product(*map(range, reversed(sides))))
  return [
    Device(i, kind, i // 4, i // len(places), (*reversed(place), 0, 0)[:3])
    for i, place in enumerate(places * slices)
  ]


def mesh_config(**mesh):
  return testing.small_config(
    batch_size=512, **{f"mesh__{name}": size for name, size in mesh.items()}
  )


def test_gpus_of_several_hosts_lie_host_by_host():
  mesh = sharding.make_mesh(mesh_config(fsdp=8), gpus(2, 8))
  assert [x.id for x in mesh.devices.flat] == list(range(16))
  assert mesh.shape["data"] == 2 and mesh.shape["fsdp"] == 8


@pytest.mark.parametrize(
  "kind, sides, sizes",
  [
    ("TPU v6 lite", (16, 16), {"data": 4, "fsdp": 64}),
    ("TPU v6 lite", (4, 4), {"data": 2, "fsdp": 8}),
    ("TPU v6 lite", (4, 4), {"data": 8, "tensor": 2}),
    ("TPU v5 lite", (16, 16), {"data": 4, "fsdp": 64}),
    ("TPU v5", (4, 4, 4), {"fsdp": 64}),
    ("TPU v4", (4, 4, 4), {"data": 8, "fsdp": 8}),
  ],
)
def test_a_mesh_may_split_a_side_of_the_torus(kind, sides, sizes):
  devices = tpus(kind, *sides)
  mesh = sharding.make_mesh(mesh_config(**sizes), devices)
  assert {x: mesh.shape[x] for x in sizes} == sizes
  assert {x.id for x in mesh.devices.flat} == set(range(len(devices)))


def test_slices_of_tpus_split_the_batch():
  devices = tpus("TPU v5 lite", 4, 4, slices=4)
  mesh = sharding.make_mesh(mesh_config(data=2, fsdp=8, tensor=4), devices)
  slices = np.vectorize(lambda x: x.slice_index)(mesh.devices)[..., 0]
  # Two along data and two along fsdp, of which each has a half.
  assert slices.shape == (2, 8, 4)
  assert (slices == slices[:, :, :1]).all()
  assert slices[:, :, 0].tolist() == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]
  with pytest.raises(ConfigError, match="a multiple of the 4 slices"):
    sharding.make_mesh(mesh_config(data=1, fsdp=2, tensor=32), devices)


def test_processes_that_share_some_rows_are_refused():
  config = testing.small_config(
    batch_size=6, mesh__data=3, mesh__tensor=2, model__embed_dim=12
  )
  mesh = sharding.make_mesh(config, gpus(2, 3))
  with pytest.raises(ConfigError, match="data = 3: splits the batch so that"):
    sharding.process_rows(config, mesh)
  mesh = sharding.make_mesh(config, gpus(3, 2))
  assert sharding.process_rows(config, mesh) == [0, 1]
