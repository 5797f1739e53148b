"""What is required of a run before it starts, so that it can learn."""

import dataclasses
from collections.abc import Collection

from ultramem_jax.settings.checks import INT_END, require
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import few
from ultramem_jax.settings.optim import OptimConfig
from ultramem_jax.train import optim as optim_lib
from ultramem_jax.train import sharding
from ultramem_jax.train.tables import is_memory, is_table
from ultramem_jax.train.trainable import is_trainable

LORA = "/lora_a"


def require_trainable(config: Config) -> None:
  """Raises ConfigError if a run cannot train what it is to train.

  This is so if no parameter would be trained, if a part of the distillation
  teacher would be, if the tables are int8, which are for serving only, or if
  a step reads a table too often to count the reads.
  """
  require_matching_patterns(config)
  require_fixed_teacher(config)
  reads = optim_lib.reads_per_table(config)
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
  used = {
    optim_lib.multiplier(optim, path)
    for path in paths
    if is_trainable(path, optim.trainable) and not is_table(path)
  }
  return [pair for pair in optim.multipliers if pair in used]


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
