"""Copies a trained run, with tables in fewer bits, for serving."""

import functools
import os
from typing import Any

import jax
from flax import traverse_util

from ultramem_jax import data
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.ops import precision
from ultramem_jax.runs import inputs
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config
from ultramem_jax.tools import derived_run, fit
from ultramem_jax.train.tables import is_table

DTYPES = ("int8", "bfloat16")


def quantized_config(config: Config, dtype: str) -> Config:
  """Returns a run's config with tables of dtype.

  Raises:
    ConfigError: the run has no tables, or they are not float32.
  """
  memory = config.model.memory
  require(
    bool(config.model.spans),
    "model.memory.kind",
    memory.kind,
    "has no table to quantize",
  )
  require(
    memory.storage.table_dtype == "float32",
    "model.memory.storage.table_dtype",
    memory.storage.table_dtype,
    "must be float32 to be quantized",
  )
  fields = config_lib.to_dict(config)
  fields["model"]["memory"]["storage"]["table_dtype"] = dtype
  # A dense update needs float32 tables. No kernel reads int8, and that of a TPU
  # reads float32 only.
  fields["optim"]["table_update"] = "auto"
  fields["model"]["memory"]["storage"]["kernel"] = "xla"
  return config_lib.parse(fields)


def quantize(params: Any, dtype: str) -> Any:
  """Returns params with tables of dtype, and their scales if it is int8."""
  rows = jax.jit(precision.quantize_rows)
  encode = jax.jit(
    functools.partial(precision.encode, dtype=precision.DTYPES[dtype])
  )
  flat = traverse_util.flatten_dict(params, sep="/")
  for path in filter(is_table, list(flat)):
    if dtype == "int8":
      flat[path], flat[f"{path}_scale"] = rows(flat[path])
    else:
      flat[path] = encode(flat[path])
  return traverse_util.unflatten_dict(flat, sep="/")


def quantize_run(
  loaded: TrainedModel,
  workdir: str | os.PathLike,
  output: str | os.PathLike,
  dtype: str,
  accept_changed_data: bool = False,
) -> dict[str, Any]:
  """Writes a run with quantized tables to a workdir of its own.

  Args:
    loaded: the model of the run, on these devices.
    workdir: the run's directory; the new run keeps its config, whatever the
      devices are here.
    output: directory of the new run, empty or absent.
    dtype: one of DTYPES.
    accept_changed_data: evaluates on other text than the run has read so far.
  Returns:
    "step", "dtype", and the validation losses "loss_before", "loss" and
    "change", their difference.
  Raises:
    ConfigError: output holds something; the run has no tables, or they are not
      float32; a batch needs more memory than there is; or the validation split
      of the run has changed.
  """
  workdir_lib.require_unused("output", output)
  config = quantized_config(workdir_lib.load_config(workdir), dtype)
  fit.check_evaluation(loaded.config, loaded.layout.mesh.size)
  corpus = data.open(loaded.config)
  inputs.require_same(workdir, corpus.inputs("valid"), accept_changed_data)
  variables = {
    **loaded.variables,
    "params": quantize(loaded.variables["params"], dtype),
  }
  before, after = (
    loss_lib.on_validation_split(here, corpus, loaded.layout)(held)["loss"]
    for here, held in (
      (loaded.config, loaded.variables),
      (quantized_config(loaded.config, dtype), variables),
    )
  )
  derived_run.write(output, workdir, config, variables, loaded.step, after)
  return {
    "step": loaded.step,
    "dtype": dtype,
    "loss_before": before,
    "loss": after,
    "change": after - before,
  }
