"""Counts what a model costs, and says whether its training fits in memory.

  python -m ultramem_jax accounting --config=configs/151m_x12.py --batch=64

Parameters, FLOPs and memory access are counted by the rules of the paper's
tables (ultramem_jax/tools/accounting.py), bytes of training by
ultramem_jax/tools/fit.py. Nothing is allocated.
"""

import json
import math

from absl import flags

from ultramem_jax import cli
from ultramem_jax.runs import distributed
from ultramem_jax.settings.checks import require
from ultramem_jax.tools import accounting, device_memory, fit


def define_flags() -> None:
  cli.define_config()
  flags.DEFINE_multi_integer(
    "batch",
    list(accounting.BATCHES),
    "Sequences of a decoding step; repeatable.",
    lower_bound=1,
  )
  flags.DEFINE_integer(
    "devices", 1, "Devices that train the model.", lower_bound=1
  )
  flags.DEFINE_float(
    "memory",
    None,
    "GiB of memory of each device; by default what a device here has.",
    lower_bound=0,
  )
  flags.DEFINE_bool("json", False, "Print JSON.")


def main() -> None:
  values = flags.FLAGS
  config = cli.load_config()
  platform = ""
  if values.memory is None:
    platform = distributed.devices()[0].platform
    have = device_memory.available_bytes()
  else:
    require(
      math.isfinite(values.memory), "--memory", values.memory, "must be finite"
    )
    have = int(values.memory * fit.GIB)
  need = fit.training_bytes(config, values.devices, platform)
  if values.json:
    report = accounting.report(config.model, values.batch)
    report["training_bytes"] = need
    report["available_bytes"] = have
    report["fits"] = fit.fits(need["total"], have)
    print(json.dumps(report))
  else:
    print(accounting.summary(config.model, values.batch))
    print(fit.summary(need, have))
