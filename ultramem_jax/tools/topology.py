"""Devices to compile for; they need not be in this machine.

v5e:16x16   256 TPU v5e chips; also v2 v3 v4 v5p v6e tpu7x
h100:8      8 NVIDIA H100 GPUs of one host; h100:4x8: of 4 hosts
cpu:8       8 CPU devices, simulated
local       the accelerators, or CPU devices, of this machine
"""

import os
import re

import jax
from jax.experimental import topologies

from ultramem_jax.runs import distributed
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError, first_line

# The number of sides that a generation's layout has.
TPU_DIMENSIONS = {
  "v2": 2,
  "v3": 2,
  "v4": 3,
  "v5e": 2,
  "v5p": 3,
  "v6e": 2,
  "tpu7x": 3,
}
# libtpu asks the TPU host for these, and waits or complains without an answer.
LIBTPU_ENVIRONMENT = {
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_STDERR_LOG_LEVEL": "3",
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}
# What XLA's compiler for GPUs would ask the GPU: an H100 SXM's data sheet, and
# the versions of the libraries.
H100 = """
platform_name: "CUDA"
device_description_str: "NVIDIA H100 80GB HBM3"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
}
"""
GPU_TARGETS = {"h100": H100}
FORM = "must be like v5e:16x16, h100:8, cpu:8 or local"


def devices(name: str) -> list[jax.Device]:  # pyright: ignore[reportInvalidTypeForm]
  """Returns the devices that a topology's name stands for.

  cpu:N counts only before JAX has been used.

  Raises:
    ConfigError: no such topology, or no compiler for it here.
  """
  kind, _, layout = name.partition(":")
  if name == "local":
    return distributed.devices()
  if kind == "cpu":
    return _cpu_devices(name, layout)
  if kind in GPU_TARGETS:
    return _gpu_devices(name, kind, layout)
  require(
    kind in TPU_DIMENSIONS,
    "topology",
    name,
    f"{FORM}; chips: {', '.join([*TPU_DIMENSIONS, *GPU_TARGETS])}",
  )
  return _tpu_devices(name, kind, layout)


def _require_form(name: str, layout: str, pattern: str, allowed=FORM) -> None:
  require(re.fullmatch(pattern, layout) is not None, "topology", name, allowed)


def _cpu_devices(name, layout):
  _require_form(name, layout, "[1-9][0-9]*")
  # Setting it to the same number again would fail once JAX is in use.
  if jax.config.values["jax_num_cpu_devices"] != int(layout):
    jax.config.update("jax_num_cpu_devices", int(layout))
  found = jax.devices("cpu")
  require(
    len(found) == int(layout),
    "topology",
    name,
    f"JAX is already initialized with {len(found)} CPU devices",
  )
  return found


def _gpu_devices(name, kind, layout):
  allowed = f"{FORM}; hosts x GPUs of each, or GPUs of one"
  _require_form(name, layout, "([1-9][0-9]*x)?[1-9][0-9]*", allowed)
  hosts, _, gpus = layout.rpartition("x")
  try:
    return topologies.get_topology_desc(
      platform="cuda",
      target_config=GPU_TARGETS[kind],
      topology=f"1x{hosts or 1}x{gpus}",
    ).devices
  except NotImplementedError as error:
    raise ConfigError(
      f"topology = {name!r}: needs JAX's plugin for GPUs, which has their "
      "compiler: pip install -e '.[gpu-compile]'"
    ) from error


def _tpu_devices(name, kind, layout):
  _require_form(name, layout, "[1-9][0-9]*(x[1-9][0-9]*)+")
  sides = [int(side) for side in layout.split("x")]
  require(
    len(sides) == TPU_DIMENSIONS[kind],
    "topology",
    name,
    f"{kind} takes {TPU_DIMENSIONS[kind]} sides, such as "
    f"{kind}:{'x'.join(['4'] * TPU_DIMENSIONS[kind])}",
  )
  for variable, value in LIBTPU_ENVIRONMENT.items():
    os.environ.setdefault(variable, value)
  options = {}
  if sides == [1, 1]:
    options["chips_per_host_bounds"] = [1, 1, 1]
  if kind == "v4":  # the two cores of a chip as one device, as on a host
    options["chip_config_name"] = "megacore"
  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=name, **options
    ).devices
  except RuntimeError as error:
    if "not installed" in str(error):
      raise ConfigError(
        f"topology = {name!r}: needs libtpu, the TPU's compiler: "
        "pip install -e '.[tpu-compile]'"
      ) from error
    raise ConfigError(f"topology = {name!r}: {first_line(error)}") from error
