"""AdamW with parameter groups, and the learning-rate schedules."""

import re
from typing import Any

import jax
import optax

from ultramem_jax.config import OptimConfig

# First match wins, on the path of a parameter joined by "/".
GROUPS = (
    ("values", re.compile(r"values$")),  # the tables of the memories
    ("norms", re.compile(r"(scale|bias)$")),
    ("weights", re.compile(r"")),
)


def parameter_groups(params: Any) -> Any:
  """The group of each parameter: a tree of "values", "norms", "weights"."""

  def group(path, _):
    name = "/".join(str(key.key) for key in path)
    return next(label for label, rule in GROUPS if rule.search(name))

  return jax.tree_util.tree_map_with_path(group, params)


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


def make_optimizer(
    config: OptimConfig, steps: int
) -> optax.GradientTransformation:
  """Clipping by global norm, Adam, then decay and rate by parameter group.

  Args:
    config: rates, decay and their schedules.
    steps: of the whole run, to which the schedules stretch.
  Returns:
    A transformation for params of any model; the first update uses the rate
    of step 1.
  """
  c = config

  def group(name, schedule):
    decay = c.weight_decay if name != "norms" or c.decay_norms else 0.0
    return optax.chain(
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(lambda count: schedule(count + 1)),
    )

  return optax.chain(
      optax.clip_by_global_norm(c.clip_norm)
      if c.clip_norm
      else optax.identity(),
      optax.scale_by_adam(c.beta1, c.beta2, c.eps),
      optax.partition(
          {name: group(name, s) for name, s in schedules(c, steps).items()},
          parameter_groups,
      ),
  )
