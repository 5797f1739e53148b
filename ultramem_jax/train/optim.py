"""AdamW with parameter groups, and the learning-rate schedules."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.ops import catch_up, precision, row_update
from ultramem_jax.settings.config import Config, OptimConfig

# First match wins, on the path of a parameter joined by "/".
GROUPS = (
  ("values", re.compile(r"values$")),  # the tables of the memories
  ("norms", re.compile(r"(scale|bias)$")),
  ("weights", re.compile(r"")),
)

# Reads per row of a table and step up to which `auto` chooses the sparse
# update: its time goes with the reads, that of the dense one with the rows.
# On a CPU the two cost the same at 1.4, where all rows are read alike
# (`python -m benchmarks.table_update --parts=crossing`).
SPARSE_READS_PER_ROW = 1.0


def parameter_groups(params: Any) -> Any:
  """The group of each parameter: a tree of "values", "norms", "weights"."""

  def group(path, _):
    name = "/".join(str(key.key) for key in path)
    return next(label for label, rule in GROUPS if rule.search(name))

  return jax.tree_util.tree_map_with_path(group, params)


def is_table(path: str) -> bool:
  """Whether the parameter at path, joined by "/", is a value table."""
  return bool(dict(GROUPS)["values"].search(path))


def base_schedule(config: OptimConfig, steps: int) -> optax.Schedule:
  """Linear warm-up, then cosine: rate at a step counted from 1."""
  c = config
  return optax.warmup_cosine_decay_schedule(
    init_value=c.init_fraction * c.learning_rate,
    peak_value=c.learning_rate,
    warmup_steps=round(c.warmup_fraction * steps),
    decay_steps=steps,
    end_value=c.final_fraction * c.learning_rate,
  )


def value_multiplier(config: OptimConfig, steps: int) -> optax.Schedule:
  """Factor on the rate of value tables: k at step 0, falling to 1.

  multiplier(s) = 1 + (k - 1) * max(0, 1 - s / horizon) (paper section 3.6).
  """
  return optax.linear_schedule(
    config.value_lr_multiplier, 1.0, round(config.value_lr_horizon * steps)
  )


def schedules(config: OptimConfig, steps: int) -> dict[str, optax.Schedule]:
  """Learning rate of each parameter group at a step counted from 1."""
  base = base_schedule(config, steps)
  multiplier = value_multiplier(config, steps)
  return {
    "values": lambda step: base(step) * multiplier(step),
    "norms": base,
    "weights": base,
  }


def reads_per_row(config: Config) -> float:
  """How often a step reads a row of a table, on average; 0 without tables."""
  memory, spans = config.model.memory, config.model.spans
  reads = config.batch_size * config.data.seq_len * memory.top_m
  reads *= memory.num_heads * len(spans)
  tables = 1 if memory.shares_table else len(spans)
  return reads / (tables * memory.num_rows) if spans else 0.0


def updates_rows(config: Config) -> bool:
  """Whether the update of value tables is sparse."""
  choice = config.optim.table_update
  if not config.model.spans or choice == "dense":
    return False
  return (
    choice == "sparse"
    or config.has_low_precision_tables
    or reads_per_row(config) <= SPARSE_READS_PER_ROW
  )


def describe_table_update(config: Config) -> str:
  """One line: how value tables are updated, and why."""
  form = "sparse" if updates_rows(config) else "dense"
  low = ", in low precision" if config.has_low_precision_tables else ""
  return (
    f"table update: {form} (optim.table_update = "
    f"{config.optim.table_update}{low}; a step reads "
    f"{reads_per_row(config):.3g} times the rows of a table, auto is sparse "
    f"up to {SPARSE_READS_PER_ROW})"
  )


def table_adamw(config: OptimConfig, steps: int, step) -> row_update.AdamW:
  """The rule of value tables at a step counted from 1."""
  c = config
  return row_update.AdamW(
    c.beta1,
    c.beta2,
    c.eps,
    c.weight_decay,
    schedules(c, steps)["values"](step),
    step,
    table_past(c, steps),
  )


def table_past(config: OptimConfig, steps: int) -> catch_up.Past | None:
  """The rule of value tables at every step, if their rows catch up."""
  c = config
  if not c.table_catch_up:
    return None
  return catch_up.make_past(
    c.beta1,
    c.beta2,
    c.eps,
    c.weight_decay,
    schedules(c, steps)["values"](jnp.arange(steps + 1)),
  )


def table_moments(
  config: OptimConfig, shape: tuple[int, int]
) -> dict[str, jax.Array]:
  """Moments of a table [I, W] before the first step, if its update is sparse.

  Returns:
    "mean" [I, W]; "variance" [I, W], or [I] float32 where it is per row; where
    rows catch up, "step" [I] int32, the last that each is up to date with.
  """
  dtype = precision.DTYPES[config.table_moments]
  per_row = config.table_second_moment == "row"
  moments = {
    "mean": jnp.zeros(shape, dtype),
    "variance": jnp.zeros(shape[0], jnp.float32)
    if per_row
    else jnp.zeros(shape, dtype),
  }
  if config.table_catch_up:
    moments["step"] = jnp.zeros(shape[0], jnp.int32)
  return moments


def clip_factor(config: OptimConfig, norm):
  """What gradients of this global norm are to be multiplied with."""
  if not config.clip_norm:
    return jnp.float32(1)
  return jnp.where(norm < config.clip_norm, 1, config.clip_norm / norm)


def make_optimizer(
  config: OptimConfig, steps: int
) -> optax.GradientTransformationExtraArgs:
  """Clipping by global norm, Adam, then decay and rate by parameter group.

  Args:
    config: rates, decay and their schedules.
    steps: of the whole run, to which the schedules stretch.
  Returns:
    A transformation for params of any model; the first update uses the rate
    of step 1. `update` takes the global norm as `norm`, for gradients that
    are not all; without it, it is that of the gradients given.
  """
  c = config

  def group(name, schedule):
    decay = c.weight_decay if name != "norms" or c.decay_norms else 0.0
    return optax.chain(
      optax.add_decayed_weights(decay),
      optax.scale_by_learning_rate(lambda count: schedule(count + 1)),
    )

  def clip(gradients, state, params=None, *, norm=None):
    del params
    norm = optax.tree.norm(gradients) if norm is None else norm
    factor = clip_factor(c, norm)
    return jax.tree.map(lambda x: factor * x, gradients), state

  return optax.chain(
    optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(), clip
    ),
    optax.scale_by_adam(c.beta1, c.beta2, c.eps),
    optax.partition(
      {name: group(name, s) for name, s in schedules(c, steps).items()},
      parameter_groups,
    ),
  )
