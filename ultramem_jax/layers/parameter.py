"""Parameters of layers, whose axes have logical names for sharding."""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from ultramem_jax.ops import random

# Paths of parameters that a model in bfloat16 reads in float32, or as they are
# stored.
READ_AS_STORED = r"(norm|gating)/|(^|/)(router|core|keys|\w*values\w*)$"


def parameter(
  module: nn.Module,
  name: str,
  initializer: Callable[..., Any],
  axes: Sequence[str | None],
  shape: Sequence[int],
) -> jax.Array:
  """Returns a parameter of a module, made by its initializer at `init`.

  Args:
    module: the owner; to be called where it may call its own `param`.
    name: of the parameter.
    initializer: (key, shape, dtype) -> array; it is asked for float32, as
      Flax would ask for float64 where JAX has that enabled.
    axes: logical name of each axis, of those that `train/sharding.py` maps to
      the mesh; None: an axis that is never split.
    shape: of the parameter.
  """
  initialize = lambda key, shape: initializer(
    random.unrolled(key), shape, jnp.float32
  )
  boxed = nn.with_logical_partitioning(initialize, tuple(axes))
  value: Any = module.param(name, boxed, tuple(shape))
  return value


def uniform(bound: float) -> nn.initializers.Initializer:
  """Returns an initializer: uniform in [-bound, bound)."""
  return lambda key, shape, dtype: jax.random.uniform(
    key, shape, dtype, minval=-bound, maxval=bound
  )
