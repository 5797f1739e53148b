"""What a model costs: parameters, FLOPs of a token, memory access.

Counted on the model's own parameter tree, of which only shapes are computed:
nothing is allocated. The rules are the paper's (arXiv 2411.12364, tables 1 to
3 and figure 1): parameters without embeddings and norms; FLOPs of a token are
twice the dense parameters it uses, plus two for each value it reads.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from ultramem_jax.settings.model import ModelConfig
from ultramem_jax.train import sharding
from ultramem_jax.train.tables import is_memory, is_table

# Kinds of parameters that are not tables, by their paths; the first pattern
# that matches wins.
KINDS = {
  "embedding": r"^(embed|head)/",
  "norm": r"norm/",
  "sparse": r"/experts_",
  "dense": r"",
}
BATCHES = (1, 16, 64, 256, 1024)  # of figure 1


def kind(path: str) -> str:
  """Returns the kind of a parameter: dense, sparse, embedding or norm."""
  if is_table(path.removesuffix("_scale")):
    return "sparse"
  return next(k for k, pattern in KINDS.items() if re.search(pattern, path))


def parameters(model: ModelConfig) -> dict[str, int]:
  """Counts parameters by kind.

  Returns:
    "dense": attention, MLPs, routers, and of the memories keys, cores,
    projections and convolutions; "sparse": value tables and experts, of which
    a token uses a small part; "embedding": embedding and output head; "norm".
    The tables of the literature print dense + sparse.
  """
  counts = {"dense": 0, "sparse": 0, "embedding": 0, "norm": 0}
  for path, shape in sharding.parameter_shapes(model).items():
    counts[kind(path)] += math.prod(shape)
  return counts


def part(path: str) -> str:
  """Returns the part of the model at path: "attention", "memory.keys" ..."""
  _, *names = path.split("/")
  if is_memory(path):
    return f"memory.{names[0]}"
  if names[0] == "moe":
    return f"moe.{names[1].split('_')[0]}"
  return names[0]


def matmul_parts(model: ModelConfig) -> dict[str, int]:
  """Counts parameters of dense layers and of all experts, by part."""
  counts = {}
  for path, shape in sharding.parameter_shapes(model).items():
    if kind(path) == "dense" or part(path) == "moe.experts":
      counts[part(path)] = counts.get(part(path), 0) + math.prod(shape)
  return counts


def table_widths(model: ModelConfig) -> list[int]:
  """Returns the widths of the tables that a layer reads, one or two.

  A table that several layers share stands once among the parameters, and is
  read by each of them.
  """
  widths = {
    path.split("/")[-1]: shape[-1]
    for path, shape in sharding.parameter_shapes(model).items()
    if is_table(path)
  }
  return list(widths.values())


def values_read(model: ModelConfig, batch: int) -> int:
  """Counts values of rows read for batch tokens: layers min(B m A, I) W."""
  if not model.spans:
    return 0
  memory = model.memory
  reach = memory.table_side**2
  rows = min(batch * memory.reads, reach)
  return len(model.spans) * rows * sum(table_widths(model))


def flops_per_token(model: ModelConfig) -> dict[str, int]:
  """Counts FLOPs of a token's forward pass, by part; their sum is the total.

  2 x active dense parameters (k of X experts) + 2 x layers m A W. As in the
  paper, attention scores, norms, embedding and output head are not counted.
  """
  flops = {name: 2 * count for name, count in matmul_parts(model).items()}
  if model.moe.num_experts:
    flops["moe.experts"] *= model.moe.top_k
    flops["moe.experts"] //= model.moe.num_experts
  if model.spans:
    flops["memory.values"] = 2 * values_read(model, 1)
  return flops


def memory_access(model: ModelConfig, batch: int) -> int:
  """Counts values read by a decoding step of batch tokens, one per sequence.

  They are weights of MLPs, adapters or experts, and table rows only, as in
  figure 1: dense L 2 D F; MoE L min(k B, X) 2 D F; UltraMem adds layers
  min(B m A, I) W.
  """
  counts, moe = matmul_parts(model), model.moe
  access = counts.get("mlp", 0) + counts.get("adapter", 0)
  access += values_read(model, batch)
  if moe.num_experts:
    used = min(moe.top_k * batch, moe.num_experts)
    access += counts["moe.experts"] // moe.num_experts * used
  return access


def report(
  model: ModelConfig, batches: Sequence[int] = BATCHES
) -> dict[str, Any]:
  """Returns everything above as one dict of plain numbers, ready for JSON."""
  flops = flops_per_token(model)
  return {
    "params": parameters(model),
    "flops_per_token": sum(flops.values()),
    "flops_by_part": flops,
    "memory_access": {
      str(batch): memory_access(model, batch) for batch in batches
    },
  }


def summary(model: ModelConfig, batches: Sequence[int] = BATCHES) -> str:
  """Returns the report as a table for people."""
  costs = report(model, batches)
  sections = {
    "parameters": costs["params"],
    f"FLOPs per token: {costs['flops_per_token']:,}": costs["flops_by_part"],
    "values read per decoding step": {
      f"batch {batch}": values
      for batch, values in costs["memory_access"].items()
    },
  }
  lines = []
  for title, rows in sections.items():
    lines.append(title)
    lines += [f"  {name:<26}{count:>22,}" for name, count in rows.items()]
  return "\n".join(lines)


def headline(model: ModelConfig) -> str:
  """Returns the main numbers of the report in one line."""
  counts, flops = parameters(model), sum(flops_per_token(model).values())
  return (
    f"parameters: {counts['dense']:,} dense, {counts['sparse']:,} sparse, "
    f"{counts['embedding']:,} embedding; FLOPs per token: {flops:,}"
  )
