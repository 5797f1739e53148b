"""Tests of the rules that place arrays on a mesh; no devices are needed."""

import jax
import pytest
from jax.sharding import AbstractMesh

from tests.train.stand_ins import gpus
from ultramem_jax import testing
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train import sharding
from ultramem_jax.train import state as state_lib


def layout(config, num_devices=8):
  sizes = mesh_lib.shape(config, num_devices)
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


def test_processes_that_share_some_rows_are_refused():
  config = testing.small_config(
    batch_size=6, mesh__data=3, mesh__tensor=2, model__embed_dim=12
  )
  mesh = mesh_lib.make(config, gpus(2, 3))
  with pytest.raises(ConfigError, match="data = 3: splits the batch so that"):
    sharding.process_rows(config, mesh)
  mesh = mesh_lib.make(config, gpus(3, 2))
  assert sharding.process_rows(config, mesh) == [0, 1]


def test_scores_are_rounded_only_where_they_travel():
  settings = dict(model__dtype="bfloat16", batch_size=8)
  for mesh, dtype in (
    (dict(mesh__data=8), "float32"),
    (dict(mesh__fsdp=8), "bfloat16"),
  ):
    config = testing.small_config(**settings, **mesh)
    assert layout(config).dtype == dtype


@pytest.mark.parametrize("kind, told", [("none", True), ("ultramem", False)])
def test_an_axis_that_splits_nothing_is_told(kind, told):
  config = testing.small_config(model__memory__kind=kind, mesh__table=8)
  line = sharding.describe(config, layout(config))
  assert ("splits nothing" in line) == told
