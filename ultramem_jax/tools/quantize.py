"""A trained run with tables in fewer bits, for serving.

  python -m ultramem_jax.quantize --workdir=runs/a --output=runs/a8 --dtype=int8

int8: a quarter of float32's bytes and a scale for each row. bfloat16: half of
them. The output is the workdir of a run, for eval.py and generation; the loss
on the validation split before and after is printed as a line of JSON.
"""

import functools
import json
import pathlib

import jax
from absl import flags
from flax import traverse_util

from ultramem_jax import cli
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.ops import precision
from ultramem_jax.runs import checkpoint
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config
from ultramem_jax.train.optim import is_table

DTYPES = ("int8", "bfloat16")


def quantized_config(config: Config, dtype: str) -> Config:
  """The config of a run whose tables become dtype.

  Raises:
    ConfigError: the run has no tables, or not in float32.
  """
  memory = config.model.memory
  require(
    bool(config.model.spans),
    "model.memory.kind",
    memory.kind,
    "has no table to quantize",
  )
  require(
    memory.table_dtype == "float32",
    "model.memory.table_dtype",
    memory.table_dtype,
    "must be float32 to be quantized",
  )
  fields = config_lib.to_dict(config)
  fields["model"]["memory"]["table_dtype"] = dtype
  # What is for float32 tables alone would be refused.
  fields["optim"].update(table_update="auto", table_catch_up=False)
  fields["model"]["memory"]["kernel"] = "xla"
  return config_lib.parse(fields)


def quantize(params, dtype: str):
  """Params whose float32 tables are dtype; with int8 also their scales."""
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


def main() -> None:
  values = flags.FLAGS
  require(
    bool(values.output),
    "--output",
    values.output,
    "must name a directory for the quantized run",
  )
  output = pathlib.Path(values.output)
  require(
    not output.exists() or (output.is_dir() and not any(output.iterdir())),
    "--output",
    values.output,
    "must be an empty directory, or absent",
  )
  run = load_lib.from_flags()
  # As the run has it, whatever the devices of here are.
  config = quantized_config(
    workdir_lib.load_config(values.workdir), values.dtype
  )
  variables = {
    **run.variables,
    "params": quantize(run.variables["params"], values.dtype),
  }
  before, after = (
    loss_lib.on_validation_split(here, run.layout)(
      held["params"], held["buffers"]
    )
    for here, held in (
      (run.config, run.variables),
      (quantized_config(run.config, values.dtype), variables),
    )
  )
  workdir_lib.claim(output, config, workdir_lib.load_corpus(values.workdir))
  with checkpoint.Checkpointer(output, keep=1) as checkpointer:
    checkpointer.save(run.step, variables, {}, after["loss"])
  print(
    json.dumps(
      {
        "step": run.step,
        "dtype": values.dtype,
        "loss_before": before["loss"],
        "loss": after["loss"],
        "change": after["loss"] - before["loss"],
      }
    )
  )


if __name__ == "__main__":
  load_lib.define_flags()
  flags.DEFINE_string("output", None, "Directory of the new run.")
  flags.DEFINE_enum("dtype", "int8", DTYPES, "Of the tables.")
  cli.run(main)
