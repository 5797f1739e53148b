"""How parameters and tables are updated, and the learning-rate schedules."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ultramem_jax.ops import row_update
from ultramem_jax.ops.row_update import Table
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.optim import OptimConfig
from ultramem_jax.train import guard
from ultramem_jax.train.tables import TableGradients, Tables

# Reads per row of a table and step up to which `auto` chooses the sparse
# update: its time goes with the reads, that of the dense one with the rows.
# On a CPU the two cost the same at 1.4, where all rows are read alike
# (`python -m benchmarks.table_update --parts=crossing`).
SPARSE_READS_PER_ROW = 1.0


def is_scale_or_bias(path: str) -> bool:
  """Returns whether the parameter at path is a scale, or a bias.

  Scales are of norms and gates.
  """
  return bool(re.search(r"(scale|bias)$", path))


def base_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
  """Returns the schedule: linear warm-up, then cosine; steps count from 1.

  It is the rate of all parameters but the tables.
  """
  return optax.warmup_cosine_decay_schedule(
    init_value=optim.init_fraction * optim.learning_rate,
    peak_value=optim.learning_rate,
    warmup_steps=round(optim.warmup_fraction * steps),
    decay_steps=steps,
    end_value=optim.final_fraction * optim.learning_rate,
  )


def value_multiplier(optim: OptimConfig, steps: int) -> optax.Schedule:
  """Returns the factor on the rate of value tables: k at step 0, falling to 1.

  multiplier(s) = 1 + (k - 1) * max(0, 1 - s / horizon) (paper section 3.6).
  """
  return optax.linear_schedule(
    optim.value_lr_multiplier, 1.0, round(optim.value_lr_horizon * steps)
  )


def value_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
  """Returns the rate of value tables at a step counted from 1."""
  base = base_schedule(optim, steps)
  multiplier = value_multiplier(optim, steps)
  return lambda step: base(step) * multiplier(step)


def reads_per_table(config: Config) -> int:
  """Returns how many rows of a table a step reads; 0: no table."""
  memory, spans = config.model.memory, config.model.spans
  places = len(spans) if memory.shares_table else min(len(spans), 1)
  return config.batch_size * config.data.seq_len * memory.reads * places


def reads_per_row(config: Config) -> float:
  """Returns how often a step reads a row of a table on average; 0: no table."""
  return reads_per_table(config) / config.model.memory.num_rows


def updates_rows(config: Config) -> bool:
  """Returns whether the update of value tables is sparse."""
  choice = config.optim.table_update
  if not config.model.spans or choice == "dense":
    return False
  return (
    choice == "sparse"
    or config.has_low_precision_tables
    or config.optim.chooses_rows
    or reads_per_row(config) <= SPARSE_READS_PER_ROW
  )


def describe_table_update(config: Config) -> str:
  """Returns one line: how value tables are updated, and why."""
  form = "sparse" if updates_rows(config) else "dense"
  optim = config.optim
  low = ", in low precision" if config.has_low_precision_tables else ""
  spared = (
    f" and read by at most {optim.table_max_share:.4g} of all texts counted"
    if optim.table_max_share < 1
    else ""
  )
  rows = (
    f", of the {optim.table_top_t} rows of a table that are most special to "
    f"a step by {optim.table_rows}{spared}"
    if optim.chooses_rows
    else ""
  )
  return (
    f"table update: {form} {optim.table_rule}{rows} (optim.table_update = "
    f"{optim.table_update}{low}; a step reads a row "
    f"{reads_per_row(config):.3g} times on average, auto is dense above "
    f"{SPARSE_READS_PER_ROW:g})"
  )


def clip_factor(optim: OptimConfig, norm: jax.Array) -> jax.Array:
  """Returns what to multiply gradients of this global norm by."""
  if not optim.clip_norm:
    return jnp.float32(1)
  return jnp.where(norm < optim.clip_norm, 1, optim.clip_norm / norm)


def scale_by_adam(optim: OptimConfig) -> optax.GradientTransformationExtraArgs:
  """As `optax.scale_by_adam`, with moments that stay if no step is taken.

  The updates are made of the moments that are kept. If these were chosen
  afterwards, XLA's CPU compiler would make the moments once more for the
  updates, from copies of those before the step.

  Args:
    optim: of the run.
  Returns:
    A transformation whose `update` takes `is_taken`, a bool scalar. If False,
    the updates are of no use.
  """
  adam = optax.scale_by_adam(optim.beta1, optim.beta2, optim.eps)

  def update(updates, state, params=None, *, is_taken: Any = True, **_: Any):
    del params
    mu = optax.tree.update_moment(updates, state.mu, optim.beta1, 1)
    nu = optax.tree.update_moment_per_elem_norm(
      updates, state.nu, optim.beta2, 2
    )
    mu, nu = guard.keep(is_taken, (mu, nu), (state.mu, state.nu))
    count = optax.safe_increment(state.count)
    mean = optax.tree.bias_correction(mu, optim.beta1, count)
    mean_square = optax.tree.bias_correction(nu, optim.beta2, count)
    updates = jax.tree.map(
      lambda m, v: m / (jnp.sqrt(v) + optim.eps), mean, mean_square
    )
    return updates, optax.ScaleByAdamState(count, mu, nu)

  return optax.GradientTransformationExtraArgs(adam.init, update)


def make_optimizer(
  optim: OptimConfig, steps: int
) -> optax.GradientTransformationExtraArgs:
  """Makes the optimizer of all parameters but the tables: AdamW, clipped.

  Args:
    optim: rates, decay and their schedules.
    steps: of the whole run, to which the schedules stretch.
  Returns:
    A transformation for the params of any model; the first update uses the
    rate of step 1. `update` takes the global norm as `norm`, for gradients
    that are not all; without it, it is that of the gradients given. It takes
    `is_taken`, too: see `scale_by_adam`.
  """

  def clip(updates, state, params=None, *, norm=None, **_: Any):
    del params
    norm = optax.tree.norm(updates) if norm is None else norm
    factor = clip_factor(optim, norm)
    return jax.tree.map(lambda x: factor * x, updates), state

  def decays(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
      lambda path, _: (
        optim.decay_norms
        or not is_scale_or_bias(
          jax.tree_util.keystr(path, simple=True, separator="/")
        )
      ),
      params,
    )

  base = base_schedule(optim, steps)
  return optax.chain(
    optax.GradientTransformationExtraArgs(
      lambda params: optax.EmptyState(), clip
    ),
    scale_by_adam(optim),
    optax.add_decayed_weights(optim.weight_decay, decays),
    optax.scale_by_learning_rate(lambda count: base(count + 1)),
    optax.stateless(lambda updates, _: multiplied(optim, updates)),
  )


def multiplier(optim: OptimConfig, path: str) -> tuple[str, float]:
  """Returns the pair of `optim.rate_multipliers` that decides a rate.

  Args:
    optim: of the run.
    path: of the parameter.
  Returns:
    The first pair whose pattern is found in the path; ("", 1.0) if none is.
  """
  pairs = (pair for pair in optim.multipliers if re.search(pair[0], path))
  return next(pairs, ("", 1.0))


def multiplied(optim: OptimConfig, updates: Any) -> Any:
  """Returns updates times the factors of `optim.rate_multipliers`."""

  def multiply(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    _, factor = multiplier(optim, name)
    return x if factor == 1 else factor * x

  return jax.tree_util.tree_map_with_path(multiply, updates)


def table_rule(
  optim: OptimConfig, steps: int, step: jax.Array
) -> row_update.AdamW | row_update.Sgd:
  """Returns the rule of the sparse update at a step counted from 1."""
  rate = jnp.float32(value_schedule(optim, steps)(step))
  if optim.table_rule == "sgd":
    return row_update.Sgd(optim.weight_decay, rate, step)
  return row_update.AdamW(
    optim.beta1, optim.beta2, optim.eps, optim.weight_decay, rate, step
  )


def update_all_rows(
  tables: Tables, gradients: TableGradients, optim: OptimConfig, steps: int
) -> Tables:
  """Updates all rows of the tables, which are float32: the dense update.

  Args:
    tables: by path, before the step.
    gradients: of `step.model_step`; those of the tables are arrays.
    optim, steps: of the run.
  Returns:
    The tables after the step.
  """
  values = {path: table.values_IW for path, table in tables.items()}
  moments: Any = optax.ScaleByAdamState(
    gradients.step - 1,
    {path: table.mu_IW for path, table in tables.items()},
    {path: table.nu for path, table in tables.items()},
  )
  updates: Any = {
    path: gradients.scale * x for path, x in gradients.by_path.items()
  }
  if optim.table_rule == "adamw":
    updates, moments = scale_by_adam(optim).update(
      updates, moments, is_taken=gradients.is_taken
    )
  rate = jnp.float32(value_schedule(optim, steps)(gradients.step))
  rest = optax.chain(
    optax.add_decayed_weights(optim.weight_decay),
    optax.scale_by_learning_rate(rate),
  )
  updates, _ = rest.update(updates, rest.init(values), values)
  updated = optax.apply_updates(values, updates)
  updated: Any = guard.keep(gradients.is_taken, updated, values)
  return {
    path: Table(updated[path], moments.mu[path], moments.nu[path])
    for path in tables
  }
