"""Which parameters a run trains, and which stay as they are."""

import dataclasses
import re
from collections.abc import Collection
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from ultramem_jax.layers.parameter import READ_AS_STORED
from ultramem_jax.settings.checks import INT_END, require
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import few
from ultramem_jax.settings.optim import OptimConfig
from ultramem_jax.train import optim as optim_lib
from ultramem_jax.train import sharding
from ultramem_jax.train.tables import is_memory, is_table

ALL = "all"
LORA = "/lora_a"


def is_trainable(path: str, pattern: str) -> bool:
  """Returns whether the parameter at path, joined by "/", is trained.

  Args:
    path: such as "memory_0/values".
    pattern: `optim.trainable`: a regular expression that is searched for in
      the path, or "all".
  """
  return pattern == ALL or bool(re.search(pattern, path))


def split(params: Any, pattern: str) -> tuple[Any, Any]:
  """Returns the parameters that are trained, and those that are frozen."""
  if pattern == ALL:
    return params, {}
  parts = {True: {}, False: {}}
  for path, leaf in traverse_util.flatten_dict(params, sep="/").items():
    parts[is_trainable(path, pattern)][path] = leaf
  trained, frozen = (
    traverse_util.unflatten_dict(parts[key], sep="/") for key in (True, False)
  )
  return trained, frozen


def stored_dtype(path: str, optim: OptimConfig) -> jnp.dtype:
  """Returns the dtype in which a run holds a parameter that is not a table."""
  frozen = not is_trainable(path, optim.trainable)
  # Parameters that even a bfloat16 model reads as they are stored, and
  # memories, which are exported with their exact numbers, stay float32.
  kept = is_memory(path) or re.search(READ_AS_STORED, path)
  narrow = frozen and not kept
  return jnp.dtype(optim.frozen_dtype if narrow else jnp.float32)


def stored(params: Any, optim: OptimConfig) -> Any:
  """Returns parameters in the dtypes in which a run holds them."""
  flat: dict[str, Any] = traverse_util.flatten_dict(params, sep="/")
  held = {
    path: x.astype(stored_dtype(path, optim)) if x.dtype == jnp.float32 else x
    for path, x in flat.items()
  }
  return traverse_util.unflatten_dict(held, sep="/")


def join(trained: Any, frozen: Any) -> Any:
  """Returns the parameters of which `split` made the parts."""
  parts = (traverse_util.flatten_dict(x, sep="/") for x in (trained, frozen))
  return traverse_util.unflatten_dict(
    {k: v for x in parts for k, v in x.items()}, sep="/"
  )


def require_trainable(config: Config) -> None:
  """Raises ConfigError if a run cannot train what it is to train.

  This is so if no parameter would be trained, if a part of the distillation
  teacher would be, if the tables are int8, which are for serving only, or if
  a step reads a table too often to count the reads.
  """
  require_matching_patterns(config)
  require_fixed_teacher(config)
  reads = round(optim_lib.reads_per_row(config) * config.model.memory.num_rows)
  require(
    not optim_lib.updates_rows(config) or reads < INT_END,
    "batch_size",
    config.batch_size,
    f"reads {reads} rows of a table in a step, which must be less than 2^31 "
    "for the sparse update: reduce it",
  )
  table_dtype = config.model.memory.storage.table_dtype
  require(
    table_dtype != "int8",
    "model.memory.storage.table_dtype",
    table_dtype,
    "cannot be trained; train float32 or bfloat16 and convert the run by "
    "python -m ultramem_jax quantize",
  )


def require_matching_patterns(config: Config) -> None:
  """Raises ConfigError if a pattern of a run finds nothing to train.

  They are those of `optim.trainable`, `optim.rate_multipliers` and
  `model.lora.targets`.
  """
  paths = sharding.parameter_axes(config.model)
  pattern = config.optim.trainable
  require(
    any(is_trainable(path, pattern) for path in paths),
    "optim.trainable",
    pattern,
    f"matches no parameter; there are {few(sorted(paths))}",
  )
  deciding = deciding_multipliers(config.optim, paths)
  for rate_pattern, factor in config.optim.multipliers:
    require(
      (rate_pattern, factor) in deciding,
      "optim.rate_multipliers",
      config.optim.rate_multipliers,
      f"{rate_pattern!r} decides the rate of no parameter that is trained, "
      "apart from tables, whose factor is optim.value_lr_multiplier, and what "
      "patterns before it match",
    )
  lora = config.model.lora
  if lora.rank and not any(path.endswith(LORA) for path in paths):
    everywhere = dataclasses.replace(lora, targets="")
    paths = sharding.parameter_axes(
      dataclasses.replace(config.model, lora=everywhere)
    )
    maps = [path.removesuffix(LORA) for path in paths if path.endswith(LORA)]
    require(
      False,
      "model.lora.targets",
      lora.targets,
      f"matches no linear map; there are {few(sorted(maps), most=7)}",
    )


def deciding_multipliers(
  optim: OptimConfig, paths: Collection[str]
) -> list[tuple[str, float]]:
  """Returns those of `optim.multipliers` that decide the rate of a parameter.

  Args:
    optim: of the run.
    paths: of the model's parameters.
  """
  deciding, left = (
    [],
    [
      path
      for path in paths
      if is_trainable(path, optim.trainable) and not is_table(path)
    ],
  )
  for pattern, factor in optim.multipliers:
    rest = [path for path in left if not re.search(pattern, path)]
    if len(rest) < len(left):
      deciding.append((pattern, factor))
    left = rest
  return deciding


def require_fixed_teacher(config: Config) -> None:
  """Raises ConfigError if `optim.distillation` has a teacher that would move.

  The teacher is the model without its memories: only these may be trained.
  """
  if not config.optim.distillation:
    return
  pattern = config.optim.trainable
  moved = [
    path
    for path in sorted(sharding.parameter_axes(config.model))
    if is_trainable(path, pattern) and not is_memory(path)
  ]
  require(
    not moved,
    "optim.distillation",
    config.optim.distillation,
    f"needs a backbone that stays as it is, and optim.trainable = {pattern!r} "
    f"trains {few(moved)}; 'memory' trains memories only",
  )


def require_new_parts_can_learn(
  config: Config, new: Collection[str] | None = None
) -> None:
  """Raises ConfigError if a new part adds nothing, and cannot learn to.

  Parts are memories, adapters and LoRA.

  Args:
    config: the run.
    new: paths of the parameters that no other run gives it; None: all.
  """
  _require_memory_can_learn(config, new)
  pattern = config.optim.trainable
  fresh = sharding.parameter_axes(config.model) if new is None else new
  for field, value, end in (
    ("model.lora.rank", config.model.lora.rank, "/lora_b"),
    ("model.adapter_dim", config.model.adapter_dim, "/adapter/down/kernel"),
  ):
    zero = [path for path in fresh if path.endswith(end)]
    require(
      not zero or any(is_trainable(path, pattern) for path in zero),
      field,
      value,
      f"adds {', '.join(sorted(zero)[:2])}, which are zero, and which "
      f"optim.trainable = {pattern!r} does not train",
    )


def _require_memory_can_learn(
  config: Config, new: Collection[str] | None
) -> None:
  """Raises ConfigError if a new memory adds nothing, and cannot learn to."""
  memory, pattern = config.model.memory, config.optim.trainable
  if memory.output == "zero":
    field, part = "output", "value_projection"
  elif memory.gate != "none" and memory.gate_init == "zero":
    field, part = "gate_init", "gating"
  elif memory.output == "empty":
    field, part = "output", "values"
  else:
    return
  paths = [
    path for path in sharding.parameter_axes(config.model) if is_memory(path)
  ]
  learns = [path for path in paths if is_trainable(path, pattern)]
  fresh = paths if new is None else [path for path in new if path in paths]
  zero = [path for path in fresh if f"/{part}" in path]
  require(
    not zero or any(f"/{part}" in path for path in learns),
    f"model.memory.{field}",
    getattr(memory, field),
    f"leaves {', '.join(zero[:2])} at zero, as optim.trainable = {pattern!r} "
    "does not train them: the memory would never learn; train them, or set "
    f"another model.memory.{field}",
  )
