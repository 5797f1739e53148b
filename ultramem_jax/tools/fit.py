"""Whether a run fits in the memory of its devices.

It is asked twice: `check` estimates what training needs before anything is
allocated or compiled, and `check_compiled` takes what the compiled step needs.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from ultramem_jax.ops import precision
from ultramem_jax.ops.sharded import lookup as sharded_lookup
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.runs import distributed
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.tools import accounting, device_memory
from ultramem_jax.tools.device_memory import GIB
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train import optim, sharding, trainable
from ultramem_jax.train import tables as tables_lib


def gib(count: float) -> str:
  """Returns a number of bytes as text, such as "85.31 GiB"."""
  return f"{count / GIB:.4g} GiB"


def fits(need: int, have: int | None) -> bool:
  """Returns whether need bytes fit in have; unknown memory fits anything."""
  return have is None or need <= have


def verdict(need: int, have: int | None) -> str:
  """Returns the answer, such as "fits 80 GiB: no, needs 85.31 GiB"."""
  if have is None:
    return f"needs {gib(need)}; the memory of this device is unknown"
  answer = "yes" if fits(need, have) else "no"
  return f"fits {gib(have)}: {answer}, needs {gib(need)}"


def check(config: Config, num_devices: int = 1) -> str:
  """Refuses a run that cannot fit, before anything is allocated.

  Returns:
    One line with the memory needed and the memory there is.
  Raises:
    ConfigError: the same line, and what to do.
  """
  platform = distributed.devices()[0].platform
  need = training_bytes(config, num_devices, platform)
  have = device_memory.available_bytes()
  if not fits(need["total"], have):
    raise ConfigError(
      f"{describe(need, have)}: use more devices, a smaller model "
      "(model.memory.num_keys), a smaller batch_size or more "
      "accumulation_steps"
    )
  return describe(need, have)


def check_compiled(config: Config, need: int) -> None:
  """Refuses a run whose compiled step needs more memory than there is.

  Args:
    config: the run.
    need: bytes that the step holds on each device.
  Raises:
    ConfigError: one line, with the memory needed and the memory there is.
  """
  have = device_memory.available_bytes()
  require(
    fits(need, have),
    "batch_size",
    config.batch_size,
    f"memory per device of the compiled step {verdict(need, have)}: reduce "
    "it, or raise accumulation_steps",
  )


def check_evaluation(config: Config, num_devices: int) -> None:
  """Refuses an evaluation whose logits need more memory than there is.

  Args:
    config: the model and the batch.
    num_devices: devices of the mesh, which config.mesh must fit.
  Raises:
    ConfigError: one line, with the memory needed and the memory there is.
  """
  sizes = mesh_lib.shape(config, num_devices)
  split = math.prod(sizes[axis] for axis in mesh_lib.BATCH_AXES)
  tokens = config.data.seq_len * (config.batch_size // split)
  need = 4 * config.model.vocab_size * tokens
  have = device_memory.available_bytes()
  require(
    fits(need, have),
    "batch_size",
    config.batch_size,
    f"memory per device of its logits {verdict(need, have)}: reduce it",
  )


def describe(need: dict[str, int], have: int | None) -> str:
  """Returns the verdict in one line.

  Args:
    need: of `training_bytes`.
    have: memory of a device in bytes; None: unknown.
  """
  passing = need["slots"] + need["activations"] + need["exchange"]
  return (
    f"memory per device: {verdict(need['total'], have)} "
    f"({gib(need['total'] - passing)} for parameters, gradients and Adam's "
    f"moments, about {gib(passing)} for activations)"
  )


def summary(need: dict[str, int], have: int | None) -> str:
  """Returns a table for people; arguments as for `describe`."""
  lines = ["training, GiB per device"]
  lines += [f"  {name:<26}{size / GIB:>22,.3f}" for name, size in need.items()]
  return "\n".join([*lines, f"  {verdict(need['total'], have)}"])


def compiled_bytes(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Returns the bytes that a compiled program holds on each device.

  Returns:
    "arguments", "outputs" other than donated arguments, "temporaries", "code",
    and "peak", their sum.
  """
  memory: Any = compiled.memory_analysis()
  sizes = {
    "arguments": memory.argument_size_in_bytes,
    "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
    "temporaries": memory.temp_size_in_bytes,
    "code": memory.generated_code_size_in_bytes,
  }
  return {**sizes, "peak": sum(sizes.values())}


def _table_bytes(config: Config, shape: tuple[int, ...]) -> tuple[int, int]:
  """Returns the bytes of a table's values, and of its moments."""
  dtype = precision.DTYPES[config.model.memory.storage.table_dtype]
  table = jax.eval_shape(
    functools.partial(
      tables_lib.new_table,
      moments=config.optim.moments,
      second_moment=config.optim.table_second_moment,
    ),
    jax.ShapeDtypeStruct(shape, dtype),
  )
  values, *moments = (x.size * x.dtype.itemsize for x in jax.tree.leaves(table))
  return values, sum(moments)


def training_bytes(
  config: Config, num_devices: int = 1, platform: str = ""
) -> dict[str, int]:
  """Returns the bytes that a training step holds on each device, by purpose.

  Args:
    config: the run.
    num_devices: devices of the mesh, which config.mesh must fit.
    platform: of the devices; "": an accelerator.
  Returns:
    "parameters"; "optimizer", the moments of those that are trained;
    "gradients" of these (twice when they are accumulated; of tables with a
    sparse update the factors of the whole batch, which each device has);
    "slots", which all reads of the step leave to be counted at its end;
    "activations", and "exchange", through which the rows of one split table
    go: estimates; "total".
  """
  sizes = mesh_lib.shape(config, num_devices)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  layout = sharding.make_layout(config, mesh)
  specs = sharding.parameter_specs(config, layout)
  shapes = {
    path: NamedSharding(mesh, specs[path]).shard_shape(shape)
    for path, shape in sharding.parameter_shapes(config.model).items()
  }
  split = math.prod(sizes[axis] for axis in mesh_lib.BATCH_AXES)
  sums = 1 if config.accumulation_steps == 1 else 2
  is_trainable = functools.partial(
    trainable.is_trainable, pattern=config.optim.trainable
  )
  parts = {"parameters": 0, "optimizer": 0, "gradients": 0}
  tables = [x for x in shapes if tables_lib.is_table(x)]
  for path in tables:
    shape = shapes.pop(path)
    values, moments = _table_bytes(config, shape)
    parts["parameters"] += values
    if is_trainable(path):
      parts["optimizer"] += moments
      if not optim.updates_rows(config):
        parts["gradients"] += sums * 4 * math.prod(shape)
  if optim.updates_rows(config) and any(map(is_trainable, tables)):
    parts["gradients"] += factor_bytes(config)
  trained = sum(math.prod(shapes[x]) for x in filter(is_trainable, shapes))
  parts["parameters"] += sum(
    trainable.stored_dtype(path, config.optim).itemsize * math.prod(shape)
    for path, shape in shapes.items()
  )
  parts["optimizer"] += 2 * 4 * trained
  parts["gradients"] += sums * 4 * trained
  tokens = config.data.seq_len * (config.batch_size // split)
  reads = config.model.memory.reads
  parts["slots"] = 4 * tokens * len(config.model.spans) * reads
  parts["activations"] = activation_bytes_per_token(config, platform) * (
    tokens // config.accumulation_steps
  )
  parts["exchange"] = exchange_bytes(config, layout)
  return {**parts, "total": sum(parts.values())}


def activation_bytes_per_token(config: Config, platform: str) -> int:
  """Estimates what the backward pass keeps, in bytes per token.

  It keeps logits and their gradient, and with distillation the logits and the
  probabilities of the teacher; the input of each block; and what blocks
  and memories hold inside, or one block when they are recomputed. On a CPU,
  attention holds the scores of one block only (`ops/attention.py`). In float32,
  without recomputing, the estimate is within 25 % of what XLA compiles for an
  accelerator; for a CPU of many layers it compiles up to half as much again.
  """
  m = config.model
  size = jnp.dtype(m.dtype).itemsize
  hidden = m.moe.top_k * m.moe.expert_dim if m.moe.num_experts else m.mlp_dim
  # Queries, keys: before and after their rotation; values and their sum.
  attended = 3 * m.head_dim * (m.num_heads + m.num_kv_heads)
  hidden *= len(m.mlp_layers)
  hidden += m.adapter_dim * len(m.adapter_layers)
  hidden /= m.num_layers
  inside = int(size * (4 * m.embed_dim + attended + 3 * hidden))
  scores = 0
  if m.attention == "xla":  # scores, softmax and gradient are float32 arrays
    scores = 3 * 4 * m.num_heads * config.data.seq_len
  memory = 2 * 4 * m.memory.expansion * m.memory.value_dim  # the pooled rows
  if m.remat == "none":
    inside = m.num_layers * inside + len(m.spans) * memory
    scores *= 1 if platform == "cpu" else m.num_layers
  rows = 4 if config.optim.distillation else 2  # of float32, as wide as V
  inputs = size * m.num_layers * m.embed_dim
  return rows * 4 * m.vocab_size + inputs + inside + scores


def exchange_bytes(config: Config, layout: Layout) -> int:
  """Estimates the bytes that a device holds to read a split table."""
  m, shards = config.model.memory, layout.size(layout.table_axes)
  if not config.model.spans or shards == 1:
    return 0
  batch, length = (
    config.batch_size // config.accumulation_steps,
    config.data.seq_len,
  )
  axes = layout.token_axes(batch, length)
  return sharded_lookup.bytes_held(
    layout.partition,
    shards,
    devices=layout.size(
      tuple(axis for axis in axes if axis in layout.table_axes)
    ),
    tokens=batch * length // layout.size(axes),
    num_rows=m.stored_rows,
    reads=m.reads,
    width=m.value_dim,
    cores=m.num_cores,
    pools=m.projections,
    itemsize=jnp.dtype(config.model.dtype).itemsize,
  )


def factor_bytes(config: Config) -> int:
  """Returns the bytes of the tables' gradients as factors, for a batch."""
  m = config.model.memory
  reads = m.reads * (2 + 2 + m.num_cores)  # sorted, and indices
  widths = accounting.table_widths(config.model)
  layer = 4 * sum(reads + m.projections * width for width in widths)
  tokens = config.batch_size * config.data.seq_len
  return tokens * len(config.model.spans) * layer
