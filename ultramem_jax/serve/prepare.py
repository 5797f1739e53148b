"""Variables for serving: what parameters alone decide, computed once."""

import re

import jax
import jax.numpy as jnp
from flax import traverse_util

# Parameters that a model in bfloat16 reads in float32, or as they are stored.
UNCAST = r"norm/|(^|/)(router|core|keys|\w*values\w*)$"


def prepare(model, variables, *inputs, platform: str | None = None):
  """The variables with which a model serves: the same results, read faster.

  Adds the collection "serving", in which memory layers find their normalized
  keys and the keys that are folded with the filter vectors; for a CPU moves
  matrices to the collection "transposed", for `ops.few_rows`; casts weights to
  the type they are multiplied in. To be called once per weights.

  Args:
    model: a Transformer, or any Flax model that holds memory layers.
    variables: its params and buffers.
    inputs: of a forward, of any size; nothing else than these collections is
      computed from them. By default one token, as a Transformer takes it.
    platform: that is to serve; None: JAX's default.
  Returns:
    Variables for `model.apply`, decoding or not.
  """
  inputs = inputs or (jnp.zeros((1, 1), jnp.int32),)
  made = ["serving"]
  if (platform or jax.default_backend()) == "cpu":
    made.append("transposed")

  @jax.jit
  def prepared(variables):
    return model.apply(variables, *inputs, mutable=made)[1]

  added = prepared(variables)
  params = traverse_util.flatten_dict(variables["params"])
  for path in traverse_util.flatten_dict(added.get("transposed", {})):
    del params[path]
  params = traverse_util.unflatten_dict(params)
  return {**_cast(model, {**variables, "params": params}), **added}


def _cast(model, variables):
  """Weights in the model's dtype, where it has one."""
  config = getattr(model, "config", None)
  dtype = jnp.dtype(getattr(config, "dtype", jnp.float32))
  if dtype == jnp.float32:
    return variables
  flat = traverse_util.flatten_dict(variables["params"], sep="/")
  cast = {
    path: x if re.search(UNCAST, path) else x.astype(dtype)
    for path, x in flat.items()
  }
  return {**variables, "params": traverse_util.unflatten_dict(cast, sep="/")}
