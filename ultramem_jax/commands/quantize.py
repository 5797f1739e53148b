"""Copies a trained run, with tables in fewer bits, for serving.

  python -m ultramem_jax quantize --workdir=runs/a --output=runs/a8 --dtype=int8

int8: a quarter of float32's bytes and a scale for each row. bfloat16: half of
them. The output is the workdir of a run, for eval.py and generation; the loss
on the validation split before and after is printed as a line of JSON.
"""

import json

from absl import flags

from ultramem_jax import cli
from ultramem_jax.commands import model_flags
from ultramem_jax.runs import metrics
from ultramem_jax.tools import quantize


def define_flags() -> None:
  model_flags.define()
  cli.define_accept_changed_data()
  flags.DEFINE_string("output", None, "Directory of the new run.")
  model_flags.define_batch_size()
  flags.DEFINE_enum("dtype", "int8", quantize.DTYPES, "Dtype of the tables.")


def main() -> None:
  values = flags.FLAGS
  model_flags.require_output("a directory for the quantized run")
  loaded = model_flags.load()
  config = model_flags.with_text(loaded.config, {}, values.batch_size)
  loaded = loaded._replace(config=config)
  report = quantize.quantize_run(
    loaded,
    values.workdir,
    values.output,
    values.dtype,
    values.accept_changed_data,
  )
  print(json.dumps(metrics.plain(report), allow_nan=False))
