"""Counts what a model costs: parameters, FLOPs, memory access, bytes to train.

  python -m ultramem_jax accounting --config=configs/151m_x12.py --batch=64

Nothing is allocated. The rules are those of the paper's tables; see
ultramem_jax/tools/accounting.py.
"""

import json

from absl import flags

from ultramem_jax import cli
from ultramem_jax.tools import accounting


def define_flags() -> None:
  cli.define_config()
  flags.DEFINE_multi_integer(
    "batch",
    list(accounting.BATCHES),
    "Sequences of a decoding step; repeatable.",
    lower_bound=1,
  )
  flags.DEFINE_integer("devices", 1, "Devices that train it.", lower_bound=1)
  flags.DEFINE_bool("json", False, "Print JSON.")


def main() -> None:
  values = flags.FLAGS
  arguments = (cli.load_config(), values.batch, values.devices)
  if values.json:
    print(json.dumps(accounting.report(*arguments)))
  else:
    print(accounting.summary(*arguments))
