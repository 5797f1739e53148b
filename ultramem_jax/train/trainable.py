"""Which parameters a run trains, and which stay as they are."""

import re
from typing import Any

import jax.numpy as jnp
from flax import traverse_util

from ultramem_jax.layers.parameter import READ_AS_STORED
from ultramem_jax.settings.optim import OptimConfig
from ultramem_jax.train.tables import is_memory

ALL = "all"


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
