"""What a model costs: parameters, FLOPs, memory access, bytes of training.

Counted on the model's own parameter tree, of which only shapes are computed:
nothing is allocated. The rules are the paper's (arXiv 2411.12364, tables 1 to
3 and figure 1): parameters without embeddings and norms; FLOPs of a token are
twice the dense parameters it uses, plus two for each value it reads.
"""

import functools
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, NamedSharding

from ultramem_jax.ops import precision
from ultramem_jax.ops.sharded import lookup as sharded_lookup
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.model import ModelConfig
from ultramem_jax.train import optim, sharding

# The kind of a parameter, by its path; the first pattern that matches wins.
KINDS = {
  "embedding": r"^(embed|head)/",
  "norm": r"norm/",
  "sparse": r"values(_scale)?$|/experts_",
  "dense": r"",
}
BATCHES = (1, 16, 64, 256, 1024)  # of figure 1


def parameter_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
  """The shape of every parameter, by path, such as "block_0/mlp/up/kernel"."""
  return {
    "/".join(path): tuple(size for _, size in axes)
    for path, axes in sharding.parameter_axes(model).items()
  }


def kind(path: str) -> str:
  """The kind of the parameter at path: dense, sparse, embedding or norm."""
  return next(k for k, pattern in KINDS.items() if re.search(pattern, path))


def parameters(model: ModelConfig) -> dict[str, int]:
  """Parameters by kind.

  Returns:
    "dense": attention, MLPs, routers, and of the memories keys, cores,
    projections and convolutions; "sparse": value tables and experts, of which
    a token uses a small part; "embedding": embedding and output head; "norm".
    The tables of the literature print dense + sparse.
  """
  counts = dict.fromkeys(("dense", "sparse", "embedding", "norm"), 0)
  for path, shape in parameter_shapes(model).items():
    counts[kind(path)] += math.prod(shape)
  return counts


def part(path: str) -> str:
  """The part of the model at path: "attention", "mlp", "memory.keys" ..."""
  module, *names = path.split("/")
  if module.startswith("memory"):
    return f"memory.{names[0]}"
  if names[0] == "moe":
    return f"moe.{names[1].split('_')[0]}"
  return names[0]


def matmul_parts(model: ModelConfig) -> dict[str, int]:
  """Parameters of dense layers and experts, by part; all X experts."""
  counts = {}
  for path, shape in parameter_shapes(model).items():
    if kind(path) == "dense" or part(path) == "moe.experts":
      counts[part(path)] = counts.get(part(path), 0) + math.prod(shape)
  return counts


def rows_read(model: ModelConfig, batch: int) -> int:
  """Values of table rows read for batch tokens: layers min(B m A, I) W."""
  if not model.spans:
    return 0
  # A table shared by several layers stands once in the tree, and is read by
  # each of them: the widths are those of the distinct tables of one layer.
  widths = {
    path.split("/")[-1]: shape[-1]
    for path, shape in parameter_shapes(model).items()
    if path.endswith("values")
  }
  memory = model.memory
  reach = memory.table_side**2
  rows = min(batch * memory.top_m * memory.num_heads, reach)
  return len(model.spans) * rows * sum(widths.values())


def flops_per_token(model: ModelConfig) -> dict[str, int]:
  """FLOPs of a token's forward pass, by part; the total is their sum.

  2 x active dense parameters (k of X experts) + 2 x layers m A W. As in the
  paper, attention scores, norms, embedding and output head are not counted.
  """
  flops = {name: 2 * count for name, count in matmul_parts(model).items()}
  if model.moe.num_experts:
    flops["moe.experts"] *= model.moe.top_k
    flops["moe.experts"] //= model.moe.num_experts
  if model.spans:
    flops["memory.values"] = 2 * rows_read(model, 1)
  return flops


def memory_access(model: ModelConfig, batch: int) -> int:
  """Values read by a decoding step of batch tokens, one per sequence.

  MLP or expert weights and table rows only, as in figure 1: dense L 2 D F;
  MoE L min(k B, X) 2 D F; UltraMem adds layers min(B m A, I) W.
  """
  counts, moe = matmul_parts(model), model.moe
  access = counts.get("mlp", 0) + rows_read(model, batch)
  if moe.num_experts:
    used = min(moe.top_k * batch, moe.num_experts)
    access += counts["moe.experts"] // moe.num_experts * used
  return access


def activation_bytes_per_token(config: Config) -> int:
  """Estimate of what the backward pass keeps, in bytes per token.

  Logits and their gradient; the input of each block; and what blocks and
  memories hold inside, or one block when they are recomputed. Within 25 % of
  what XLA compiles for a CPU in float32 without recomputing.
  """
  m = config.model
  size = jnp.dtype(m.dtype).itemsize
  hidden = m.moe.top_k * m.moe.expert_dim if m.moe.num_experts else m.mlp_dim
  inside = size * (10 * m.embed_dim + 3 * hidden)
  if m.attention == "xla":  # scores, softmax and gradient are float32 arrays
    inside += 3 * 4 * m.num_heads * config.data.seq_len
  memory = 2 * 4 * m.memory.expansion * m.memory.value_dim  # the pooled rows
  if config.optim.table_catch_up and optim.updates_rows(config):
    # The rows read, brought up to date.
    memory += 4 * m.memory.num_heads * m.memory.top_m * m.memory.value_dim
  if m.remat == "none":
    inside = m.num_layers * inside + len(m.spans) * memory
  return 2 * 4 * m.vocab_size + size * m.num_layers * m.embed_dim + inside


def training_bytes(config: Config, num_devices: int = 1) -> dict[str, int]:
  """Bytes that a training step holds on each device.

  Args:
    config: the run.
    num_devices: devices of the mesh, which config.mesh must fit.
  Returns:
    "parameters", "optimizer" (two moments of Adam), "gradients" (twice when
    they are accumulated; of tables with a sparse update, the factors);
    "slots", which all reads of the step leave to be counted at its end;
    "activations", and "exchange", through which the rows of one split table
    go: estimates; "total".
  """
  sizes = sharding.mesh_shape(config, num_devices)
  mesh = AbstractMesh(tuple(sizes.values()), tuple(sizes))
  layout = sharding.make_layout(config, mesh)
  specs = sharding.parameter_specs(config, layout)
  shapes = {
    path: NamedSharding(mesh, specs[tuple(path.split("/"))]).shard_shape(shape)
    for path, shape in parameter_shapes(config.model).items()
  }
  split = math.prod(sizes[axis] for axis in sharding.BATCH_AXES)
  sums = 1 if config.accumulation_steps == 1 else 2
  parts = dict.fromkeys(("parameters", "optimizer", "gradients"), 0)
  if optim.updates_rows(config):
    for path in list(filter(optim.is_table, shapes)):
      shape = shapes.pop(path)
      moments = jax.eval_shape(
        functools.partial(optim.table_moments, config.optim, shape)
      )
      parts["optimizer"] += sum(
        x.size * x.dtype.itemsize for x in moments.values()
      )
      dtype = jnp.dtype(precision.DTYPES[config.model.memory.table_dtype])
      parts["parameters"] += math.prod(shape) * dtype.itemsize
    parts["gradients"] += factor_bytes(config) // split
  dense = sum(map(math.prod, shapes.values()))
  parts["parameters"] += 4 * dense
  parts["optimizer"] += 2 * 4 * dense
  parts["gradients"] += sums * 4 * dense
  tokens = config.data.seq_len * (config.batch_size // split)
  parts["slots"] = (
    4
    * tokens
    * len(config.model.spans)
    * (config.model.memory.num_heads * config.model.memory.top_m)
  )
  parts["activations"] = activation_bytes_per_token(config) * (
    tokens // config.accumulation_steps
  )
  parts["exchange"] = exchange_bytes(config, layout)
  return {**parts, "total": sum(parts.values())}


def exchange_bytes(config: Config, layout: Layout) -> int:
  """Estimate of what a device holds to read a split table, 0 of a whole one."""
  m, shards = config.model.memory, layout.size(layout.table_axes)
  if not config.model.spans or shards == 1:
    return 0
  batch, length = (
    config.batch_size // config.accumulation_steps,
    config.data.seq_len,
  )
  axes = sharded_lookup.axes_apart(layout.tokens(batch, length))
  return sharded_lookup.bytes_held(
    layout.partition,
    shards,
    devices=layout.size([axis for axis in axes if axis in layout.table_axes]),
    tokens=batch * length // layout.size(axes),
    num_rows=m.stored_rows,
    reads=m.num_heads * m.top_m,
    width=m.value_dim,
    cores=m.num_cores,
    blocks=m.projections,
    itemsize=jnp.dtype(config.model.dtype).itemsize,
  )


def factor_bytes(config: Config) -> int:
  """Bytes of the gradients of all tables as factors, for a whole batch."""
  m = config.model.memory
  reads = m.top_m * m.num_heads * (2 + 2 + m.num_cores)  # sorted, and indices
  layer = 4 * (reads + m.projections * m.value_dim)
  tokens = config.batch_size * config.data.seq_len
  return tokens * len(config.model.spans) * layer


def host_bytes(root: str = "/") -> int | None:
  """Memory that this process may still take on the host, None if unknown.

  The least of what Linux calls available and the limit of the control group;
  elsewhere (macOS) the physical memory.
  """
  limits = []
  meminfo = pathlib.Path(root, "proc/meminfo")
  if meminfo.exists():
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    limits += [1024 * int(found[1])] if found else []
  elif {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(os.sysconf_names):
    limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
  for name in ("memory.max", "memory/memory.limit_in_bytes"):  # cgroup 2, 1
    path = pathlib.Path(root, "sys/fs/cgroup", name)
    if path.exists() and (text := path.read_text().strip()).isdecimal():
      limits.append(int(text))
  return min(limits, default=None)


def available_bytes() -> int | None:
  """Memory of one local device in bytes; None where nothing tells.

  On a CPU, what the machine and its control group still give, shared between
  the local devices.
  """
  device = jax.local_devices()[0]
  if device.platform == "cpu":
    available = host_bytes()
    return available and available // jax.local_device_count()
  return (device.memory_stats() or {}).get("bytes_limit")


def check_memory(config: Config, num_devices: int = 1) -> None:
  """Refuses a run that cannot fit, before anything is allocated.

  Raises:
    ConfigError: one line, with the memory needed and the memory there is.
  """
  need, have = training_bytes(config, num_devices), available_bytes()
  if have is None or need["total"] <= have:
    return
  passing = need["slots"] + need["activations"] + need["exchange"]
  state = need["total"] - passing
  raise ConfigError(
    f"this run needs {_gigabytes(need['total'])} of memory per device "
    f"({_gigabytes(state)} for parameters, gradients and Adam's moments, "
    f"about {_gigabytes(passing)} for activations), and there "
    f"are {_gigabytes(have)}: use more devices, a smaller model "
    "(model.memory.num_keys), a smaller batch_size or more "
    "accumulation_steps"
  )


def _gigabytes(count: int) -> str:
  return f"{count / 1e9:.1f} GB"


def report(config: Config, batches=BATCHES, num_devices: int = 1) -> dict:
  """Everything above as one dict of plain numbers, ready for JSON."""
  flops = flops_per_token(config.model)
  return {
    "params": parameters(config.model),
    "flops_per_token": sum(flops.values()),
    "flops_by_part": flops,
    "memory_access": {
      str(batch): memory_access(config.model, batch) for batch in batches
    },
    "training_bytes": training_bytes(config, num_devices),
  }


def summary(config: Config, batches=BATCHES, num_devices: int = 1) -> str:
  """The report as a table for people."""
  costs = report(config, batches, num_devices)
  sections = {
    "parameters": costs["params"],
    f"FLOPs per token: {costs['flops_per_token']:,}": costs["flops_by_part"],
    "values read per decoding step": {
      f"batch {batch}": values
      for batch, values in costs["memory_access"].items()
    },
    f"bytes per device to train on {num_devices}": costs["training_bytes"],
  }
  lines = []
  for title, rows in sections.items():
    lines.append(title)
    lines += [f"  {name:<26}{count:>22,}" for name, count in rows.items()]
  return "\n".join(lines)
