"""Prepares a model for serving: what parameters alone decide, computed once."""

import re
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from ultramem_jax.layers import prepared
from ultramem_jax.layers.parameter import READ_AS_STORED

Model = TypeVar("Model", bound=nn.Module)


def prepare(
  model: Model, variables: Any, *inputs: Any, platform: str | None = None
) -> tuple[Model, dict[str, Any]]:
  """Returns a model and variables that compute the same faster.

  The model reads the collection "prepared", which is added: the normalized
  keys of memory layers, those keys merged with the filter vectors and, for a
  CPU, transposed matrices. Parameters that are read from there are left out;
  others are cast to the type they are multiplied in. Call it once per weights.

  Args:
    model: a Transformer or a memory layer; or any Flax model that has an
      attribute `prepared_for` and passes it to its memory layers.
    variables: its params and buffers.
    inputs: of a forward, of any size; only their shapes matter. Default: one
      token, as a Transformer takes it.
    platform: that is to serve, "cpu", "gpu" or "tpu"; None: JAX's default.
  Returns:
    (model, variables) for `model.apply`, decoding or not.
  Raises:
    TypeError: the model has no attribute `prepared_for`.
  """
  inputs = inputs or (jnp.zeros((1, 1), jnp.int32),)
  model = model.clone(prepared_for=platform or jax.default_backend())

  @jax.jit
  def computed(variables):
    return model.apply(variables, *inputs, mutable=[prepared.COLLECTION])[1]

  added = computed(variables).get(prepared.COLLECTION, {})
  params: dict[str, Any] = traverse_util.flatten_dict(
    variables["params"], sep="/"
  )
  for path in traverse_util.flatten_dict(added, sep="/"):
    params.pop(path, None)
  return model, {
    **variables,
    "params": traverse_util.unflatten_dict(_cast(model, params), sep="/"),
    prepared.COLLECTION: added,
  }


def _cast(model: nn.Module, params: dict[str, Any]) -> dict[str, Any]:
  """Returns parameters by path, in the model's dtype if it has one."""
  config = getattr(model, "config", None)
  dtype = jnp.dtype(getattr(config, "dtype", jnp.float32))
  if dtype == jnp.float32:
    return params
  return {
    path: x if re.search(READ_AS_STORED, path) else x.astype(dtype)
    for path, x in params.items()
  }
