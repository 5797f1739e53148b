"""The mesh of devices: of one host, of several, and of slices of TPUs."""

import numpy as np
import pytest

from tests.train.stand_ins import gpus, tpus
from ultramem_jax import testing
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.train import mesh as mesh_lib


def mesh_config(**mesh):
  return testing.small_config(
    batch_size=512, **{f"mesh__{name}": size for name, size in mesh.items()}
  )


def test_gpus_of_several_hosts_lie_host_by_host():
  mesh = mesh_lib.make(mesh_config(fsdp=8), gpus(2, 8))
  assert [x.id for x in mesh.devices.flat] == list(range(16))
  assert mesh.shape["data"] == 2 and mesh.shape["fsdp"] == 8
  # JAX calls hosts slices, but between GPUs any axis may lie.
  mesh = mesh_lib.make(mesh_config(tensor=16), gpus(2, 8))
  assert mesh.shape["tensor"] == 16


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
  mesh = mesh_lib.make(mesh_config(**sizes), devices)
  assert {x: mesh.shape[x] for x in sizes} == sizes
  assert {x.id for x in mesh.devices.flat} == set(range(len(devices)))


def test_slices_of_tpus_split_the_batch():
  devices = tpus("TPU v5 lite", 4, 4, slices=4)
  mesh = mesh_lib.make(mesh_config(data=2, fsdp=8, tensor=4), devices)
  slices = np.vectorize(lambda x: x.slice_index)(mesh.devices)[..., 0]
  # Two along data and two along fsdp, of which each has a half.
  assert slices.shape == (2, 8, 4)
  assert (slices == slices[:, :, :1]).all()
  assert slices[:, :, 0].tolist() == [[0] * 4 + [1] * 4, [2] * 4 + [3] * 4]
  with pytest.raises(ConfigError, match="a multiple of the 4 slices"):
    mesh_lib.make(mesh_config(data=1, fsdp=2, tensor=32), devices)


def test_flash_attention_needs_gpus():
  config = testing.small_config(
    model__attention="cudnn", model__dtype="bfloat16"
  )
  with pytest.raises(ConfigError, match="attention = 'cudnn': needs GPUs"):
    mesh_lib.make(config)
