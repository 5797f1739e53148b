"""Tests of the reader of saved arrays, on checkpoints that Orbax wrote."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint import v1 as ocp

from ultramem_jax.runs import array_reader


def save(folder, tree, **storage):
  context = ocp.Context()
  context.array.saving.use_compression = False
  for name, value in storage.items():
    setattr(context.array.saving.storage_options, name, value)
  with context:
    ocp.save_checkpointables(folder / "step", {"params": tree})
  return folder / "step" / "params"


def read(folder, tree):
  sharding = SingleDeviceSharding(jax.devices()[0])
  return array_reader.read(
    folder,
    jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    ),
  )


# Chunks of 99 rows are of 11, 9 and 1 of them.
@pytest.mark.parametrize("chunk_bytes", [None, 11 * 32, 9 * 32, 32])
@pytest.mark.parametrize("block_bytes", [1, 500, 2000, 2**26])
def test_blocks_make_up_the_array(
  tmp_path, monkeypatch, chunk_bytes, block_bytes
):
  monkeypatch.setattr(array_reader, "BLOCK_BYTES", block_bytes)
  monkeypatch.setattr(array_reader, "AHEAD_BYTES", 1000)
  tree = {
    "table": jnp.arange(99 * 8, dtype=jnp.float32).reshape(99, 8),
    "nested": [jnp.arange(300, dtype=jnp.bfloat16), jnp.uint32(7)],
    "cube": jnp.arange(24, dtype=jnp.int8).reshape(2, 3, 4),
  }
  folder = save(tmp_path, tree, chunk_byte_size=chunk_bytes)
  jax.tree.map(np.testing.assert_array_equal, read(folder, tree), tree)


def test_a_block_is_whole_chunks_and_no_larger_than_asked(
  tmp_path, monkeypatch
):
  tree = {"table": jnp.zeros((96, 8))}
  folder = save(tmp_path, tree, chunk_byte_size=8 * 32)  # of 8 rows
  put = []
  monkeypatch.setattr(
    array_reader,
    "_write",
    lambda part, block, start: put.append((start, len(block))) or part,
  )
  monkeypatch.setattr(array_reader, "BLOCK_BYTES", 23 * 32)
  read(folder, tree)
  assert put == [(start, 16) for start in range(0, 96, 16)]


def test_what_is_not_there_is_an_error(tmp_path):
  folder = save(tmp_path, {"a": jnp.zeros(3)})
  with pytest.raises(ValueError, match=r"b/zarr\.json"):
    read(folder, {"b": jnp.zeros(3)})
