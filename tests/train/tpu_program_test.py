"""What the TPU's compiler makes of a memory at full table size.

Nothing but the programs' text is looked at: a table's rows are gathered where
they lie, and no loop goes token by token.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from ultramem_jax import MemoryConfig, UltraMem, testing
from ultramem_jax.ops import lookup, tucker
from ultramem_jax.ops.kernels import pallas
from ultramem_jax.tools import hlo, topology
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train import program, sharding

pytestmark = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is missing: pip install -e '.[tpu-compile]'",
)

TOKENS = 512
CONFIG = MemoryConfig(num_keys=512, key_dim=64, value_dim=512, top_m=8)
TABLE = (CONFIG.num_rows, CONFIG.value_dim)
TABLE_BYTES = 4 * TABLE[0] * TABLE[1]  # 512 MiB
# Give back an array that they were given.
ALIASES = ("parameter", "bitcast", "get-tuple-element", "tuple", "while")


# What is looked for does not depend on how fast the program is to be.
QUICK = {"exec_time_optimization_effort": -1.0}


def on_chip(arrays, chip="v5e"):
  """Abstract arrays on one chip, like arrays or their shapes."""
  place = SingleDeviceSharding(topology.devices(f"{chip}:1x1")[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), arrays
  )


def compile_for_tpu(function, *arguments, chip="v5e", **options):
  """Compiles for one TPU chip; arguments are arrays or their shapes."""
  lowered = jax.jit(function, **options).lower(*on_chip(arguments, chip))
  return lowered.compile(QUICK)


def table_sized(program: hlo.Program) -> list[hlo.Instruction]:
  """Instructions outside fusions that make an array of the table's shape."""
  shape = "[" + ",".join(map(str, TABLE)) + "]"
  fused = {
    name
    for lines in program.computations.values()
    for line in lines
    if line.opcode == "fusion"
    for name in line.called
  }
  return [
    line
    for name, lines in program.computations.items()
    if name not in fused
    for line in lines
    if shape in line.shape and line.opcode not in ALIASES
  ]


def assert_no_loop_over_tokens(program):
  assert max(program.run_counts().values()) < TOKENS / 4


def variables_and_input(layer, tokens):
  x_BTD = jax.ShapeDtypeStruct(
    (tokens[0], tokens[1], layer.embed_dim), jnp.bfloat16
  )
  variables = jax.eval_shape(layer.init, jax.random.key(0), x_BTD)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    jax.tree.map(
      lambda x: x.value if hasattr(x, "value") else x,
      variables,
      is_leaf=lambda x: hasattr(x, "value"),
    ),
  ), x_BTD


@functools.cache
def layer_gradient():
  """Forward and backward of the layer, all but the table's gradient."""
  layer = UltraMem(CONFIG, embed_dim=256, dtype=jnp.bfloat16)
  variables, x_BTD = variables_and_input(layer, (1, TOKENS))
  table_IW = variables["params"].pop("values")

  def loss(params, x_BTD, table_IW, buffers):
    params = {**params, "values": table_IW}
    y_BTD = layer.apply({"params": params, "buffers": buffers}, x_BTD)
    return y_BTD.astype(jnp.float32).sum()

  return compile_for_tpu(
    jax.value_and_grad(loss, (0, 1)),
    variables["params"],
    x_BTD,
    table_IW,
    variables["buffers"],
  )


def test_forward_and_backward_leave_the_table_where_it_lies():
  compiled = layer_gradient()
  program = hlo.Program(compiled.as_text())
  assert not table_sized(program)
  assert_no_loop_over_tokens(program)
  # Gathered rows (16 MiB) and scores of all keys (32 MiB), most of it.
  assert compiled.memory_analysis().temp_size_in_bytes < TABLE_BYTES / 4


def test_the_filter_is_a_top_k_and_no_sort():
  """1024 keys of a side; only the small grid of candidates is sorted."""
  program = hlo.Program(layer_gradient().as_text())
  lines = [line for x in program.computations.values() for line in x]
  assert any('custom_call_target="TopK"' in line.rest for line in lines)
  for line in lines:
    if line.opcode == "sort":
      assert f",{CONFIG.grid_side}]" not in line.shape, line


def test_a_dense_gradient_is_written_once():
  """Zeros, to which rows are added in place."""
  shape = (1, TOKENS, CONFIG.reads)
  compiled = compile_for_tpu(
    jax.grad(
      lambda table_IW, index_BTY, score_BTYC: lookup.pool_rows(
        table_IW, index_BTY, score_BTYC, 4
      ).sum()
    ),
    jax.ShapeDtypeStruct(TABLE, jnp.float32),
    jax.ShapeDtypeStruct(shape, jnp.int32),
    jax.ShapeDtypeStruct((*shape, 2), jnp.float32),
  )
  program = hlo.Program(compiled.as_text())
  assert_no_loop_over_tokens(program)
  made = table_sized(program)
  assert len(made) == 2, made  # zeros; the scatter into them
  assert compiled.memory_analysis().temp_size_in_bytes < TABLE_BYTES / 4


def test_decoding_reads_rows_alone():
  layer = UltraMem(CONFIG, embed_dim=256, dtype=jnp.bfloat16)
  variables, x_BTD = variables_and_input(layer, (16, 1))
  segment_BT = jax.ShapeDtypeStruct((16, 1), jnp.int32)
  cache = jax.eval_shape(
    lambda x: layer.init(jax.random.key(0), x, decode=True)["cache"], x_BTD
  )

  def decode(variables, cache, x_BTD, segment_BT):
    return layer.apply(
      {**variables, "cache": cache}, x_BTD, segment_BT, True, mutable=["cache"]
    )

  compiled = compile_for_tpu(
    decode, variables, cache, x_BTD, segment_BT, donate_argnums=1
  )
  program = hlo.Program(compiled.as_text())
  assert not table_sized(program)
  # The compiler takes 32 MiB for itself.
  assert compiled.memory_analysis().temp_size_in_bytes < TABLE_BYTES / 8


@pytest.mark.parametrize("low_precision", [False, True])
def test_a_sparse_training_step_writes_rows_alone(low_precision):
  """Of tables and moments; the first program only reads the table."""
  overrides = {
    "model__memory__num_keys": CONFIG.num_keys,
    "data__seq_len": TOKENS // 2,
    "model__memory__value_dim": CONFIG.value_dim,
    "batch_size": 2,
    "model__memory__top_m": CONFIG.top_m,
    "model__memory__spans": "1:1",
    "model__num_layers": 1,
    "optim__table_update": "sparse",
  }
  if low_precision:
    overrides |= {
      "model__memory__storage__table_dtype": "bfloat16",
      "optim__table_moments": "bfloat16",
      "optim__table_second_moment": "row",
    }
  config = testing.small_config(**overrides)
  mesh = mesh_lib.make(config, topology.devices("v5e:1x1"))
  lowered = program.lower_train_step(config, sharding.make_layout(config, mesh))
  assert set(lowered) == {"train", "update"}
  for name, part in lowered.items():
    compiled = part.compile(QUICK)
    text = hlo.Program(compiled.as_text())
    assert_no_loop_over_tokens(text)
    # Rows written in place; a second moment of rows is not an array of that
    # size.
    written = {"train": 0, "update": 2 if low_precision else 3}[name]
    made = table_sized(text)
    assert len(made) == written, made
    assert all("scatter" in line.name for line in made), made
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes < TABLE_BYTES / 4
    outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
    assert outputs < TABLE_BYTES / 64


@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_the_lookup_kernel_holds_no_gathered_rows(chip):
  """Forward, and the gradient of the scores, which reads the rows again."""
  shape = (1, TOKENS, 84)
  gradient = jax.value_and_grad(
    lambda score_BTYC, table_IW, index_BTY: jnp.square(
      lookup.pool_rows(table_IW, index_BTY, score_BTYC, 4, pallas.KERNELS)
    ).sum()
  )
  compiled = compile_for_tpu(
    gradient,
    jax.ShapeDtypeStruct((*shape, 2), jnp.float32),
    jax.ShapeDtypeStruct(TABLE, jnp.float32),
    jax.ShapeDtypeStruct(shape, jnp.int32),
    chip=chip,
  )
  assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
  assert not table_sized(hlo.Program(compiled.as_text()))
  rows = 4 * TOKENS * 84 * TABLE[1]  # 84 MiB
  assert compiled.memory_analysis().temp_size_in_bytes < rows / 5


def test_a_core_of_rank_2_needs_no_loop():
  """An SVD turns pairs of columns until they are orthogonal."""

  def opcodes(rank):
    core_CARR, *vectors = (
      jax.ShapeDtypeStruct(shape, jnp.float32)
      for shape in [(2, 2, rank, rank), (2, rank), (2, rank)]
    )
    compiled = compile_for_tpu(tucker.refresh_filter, core_CARR, *vectors)
    computations = hlo.Program(compiled.as_text()).computations
    return {line.opcode for lines in computations.values() for line in lines}

  assert not {"while", "custom-call"} & opcodes(2)
  assert "while" in opcodes(3)


def test_a_lookup_travels_beside_the_dense_layers_of_its_span(
  assert_span_overlaps,
):
  assert_span_overlaps(topology.devices("v6e:2x2"))
