"""What the GPU's compiler makes of a memory at full table size.

For an H100 that need not be there; nothing but the programs is looked at.
"""

import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from configs import tiny
from ultramem_jax.ops import lookup
from ultramem_jax.ops.kernels import pallas
from ultramem_jax.settings import config as config_lib
from ultramem_jax.tools import compile as compile_lib
from ultramem_jax.tools import hlo, topology
from ultramem_jax.train import compiler_options, program, sharding
from ultramem_jax.train import mesh as mesh_lib

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("jax_cuda12_plugin") is None,
  reason="jax_cuda12_plugin is missing: pip install -e '.[gpu-compile]'",
)

HAS_CUDNN = (
  importlib.util.find_spec("nvidia") is not None
  and importlib.util.find_spec("nvidia.cudnn") is not None
)
TOKENS, READS = 512, 84
TABLE = (1789**2, 1024)  # of 1b6_x12: its offsets need 64 bits


def compile_for_gpu(function, *arguments):
  place = SingleDeviceSharding(topology.devices("h100:1")[0])
  shapes = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=place)
    for shape, dtype in arguments
  ]
  return jax.jit(function).lower(*shapes).compile()


def kernels(compiled) -> int:
  computations = hlo.Program(compiled.as_text()).computations
  return sum(
    "gpu.triton" in line.rest
    for lines in computations.values()
    for line in lines
    if line.opcode == "custom-call"
  )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint16])
def test_the_lookup_kernel_holds_no_gathered_rows(dtype):
  """Forward, and the gradient of the scores, which reads the rows again."""
  shape = (1, TOKENS, READS)
  gradient = jax.value_and_grad(
    lambda score_BTYC, table_IW, index_BTY: jnp.square(
      lookup.pool_rows(table_IW, index_BTY, score_BTYC, 4, pallas.KERNELS)
    ).sum()
  )
  compiled = compile_for_gpu(
    gradient, ((*shape, 2), jnp.float32), (TABLE, dtype), (shape, jnp.int32)
  )
  assert kernels(compiled) == 2
  pooled = 4 * TOKENS * 4 * TABLE[1]  # 8 MiB, of 4 blocks; rows are 168 MiB
  assert compiled.memory_analysis().temp_size_in_bytes < 4 * pooled


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.uint16])
def test_the_form_of_xla_makes_no_table_either(dtype):
  shape = (1, TOKENS, READS)
  compiled = compile_for_gpu(
    lambda *inputs: lookup.pool_rows(*inputs, 4),
    (TABLE, dtype),
    (shape, jnp.int32),
    ((*shape, 2), jnp.float32),
  )
  table_bytes = TABLE[0] * TABLE[1] * jnp.dtype(dtype).itemsize
  assert compiled.memory_analysis().temp_size_in_bytes < table_bytes / 8


@pytest.mark.parametrize(
  "attention, dtype",
  [
    ("xla", "float32"),
    pytest.param(
      "cudnn",
      "bfloat16",
      marks=pytest.mark.skipif(
        not HAS_CUDNN, reason="nvidia-cudnn-cu12 is missing"
      ),
    ),
  ],
)
def test_the_steps_compile_for_a_gpu(attention, dtype):
  c = tiny.get_config()
  c.update_from_flattened_dict(
    {
      "model.num_layers": 2,
      "model.memory.spans": "1:2",
      "model.memory.storage.kernel": "pallas",
      "model.attention": attention,
      "model.dtype": dtype,
    }
  )
  config = config_lib.parse(c)
  devices = topology.devices("h100:1")
  mesh = mesh_lib.make(config, devices)
  layout = sharding.make_layout(config, mesh)
  lowered = {
    **program.lower_train_step(config, layout),
    "decode": compile_lib.lower_decode_step(config, layout, 8, 64),
  }
  for name, part in lowered.items():
    compiled = part.compile(compiler_options.for_device(devices[0]))
    costs = compile_lib.report(compiled, mesh)
    assert costs["fits"], costs
    assert kernels(compiled) >= (name != "update")
    flash = attention == "cudnn" and name == "train"
    assert ("__cudnn$fmha" in compiled.as_text()) == flash, name


def test_a_lookup_travels_beside_the_dense_layers_of_its_span(
  assert_span_overlaps,
):
  assert_span_overlaps(topology.devices("h100:4"))
