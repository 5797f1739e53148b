"""Adds the LoRA of a run to the weights, which makes a run without it."""

import dataclasses
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from ultramem_jax.ops import precision
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.lora import LoraConfig
from ultramem_jax.tools import derived_run
from ultramem_jax.train import preconditions, sharding, trainable


def merged_config(config: Config) -> Config:
  """Returns a run's config without LoRA, to be trained from its own weights.

  If the run trained nothing but the LoRA, the new one trains everything. Rates
  of the LoRA alone are dropped. What was held in bfloat16 is float32, as the
  sums of `merge` are.

  Raises:
    ConfigError: the run has no LoRA.
  """
  lora = config.model.lora
  require(
    lora.rank > 0,
    "model.lora.rank",
    lora.rank,
    "must be above 0: this run has no LoRA to merge",
  )
  model = dataclasses.replace(config.model, lora=LoraConfig())
  paths = sharding.parameter_axes(model).keys()
  pattern = config.optim.trainable
  if not any(trainable.is_trainable(path, pattern) for path in paths):
    pattern = trainable.ALL
  optim = dataclasses.replace(
    config.optim, trainable=pattern, frozen_dtype="float32"
  )
  deciding = preconditions.deciding_multipliers(optim, paths)
  rates = ",".join(f"{name}={factor!r}" for name, factor in deciding)
  optim = dataclasses.replace(optim, rate_multipliers=rates)
  return dataclasses.replace(
    config, model=model, optim=optim, init_from="", init_skip=""
  )


def merge(params: Any, lora: LoraConfig) -> Any:
  """Returns params without LoRA, float32: kernels are W + (alpha / rank) A B.

  Tables stay as they are stored.
  """
  held: dict[Any, Any] = traverse_util.flatten_dict(params)
  flat = {
    path: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x
    for path, x in held.items()
  }
  for path in [path for path in flat if path[-1] == "lora_a"]:
    *map_path, _ = path
    kernel = (*map_path, "kernel")
    a, b = flat.pop(path), flat.pop((*map_path, "lora_b"))
    flat[kernel] = _add(flat[kernel], a, b, lora.scale)
  return traverse_util.unflatten_dict(flat)


@jax.jit
def _add(kernel, a, b, scale):
  exact = precision.EXACT
  return kernel + scale * jnp.tensordot(a, b, 1, precision=exact)


def merge_run(
  loaded: TrainedModel, workdir: str | os.PathLike, output: str | os.PathLike
) -> None:
  """Writes a run with its LoRA in the weights to a workdir, at step 0.

  It appears when all of it is written, or not at all.

  Args:
    loaded: the model of the run, on these devices.
    workdir: the run's directory; the new run keeps its config but for LoRA.
    output: directory of the new run, empty or absent.
  Raises:
    ConfigError: the run has no LoRA, or the output holds something.
  """
  workdir_lib.require_unused("output", output)
  config = merged_config(workdir_lib.load_config(workdir))
  params = merge(loaded.variables["params"], loaded.config.model.lora)
  derived_run.write(
    output, workdir, config, {**loaded.variables, "params": params}
  )
