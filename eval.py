"""Evaluates the model of a workdir: loss, perplexity and bits per byte.

  python eval.py --workdir=runs/tiny
  python eval.py --workdir=runs/tiny --step=best \
      --data.source=text --data.valid_path='books/*.txt'

The result is one line of JSON.
"""

import json

from absl import flags
from ml_collections import config_flags

from configs import default
from ultramem_jax import cli, evaluate, sharding, step, trained
from ultramem_jax import config as config_lib
from ultramem_jax.data import pipeline

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run.")
STEP = flags.DEFINE_string(
    "step", "newest", "Checkpoint: newest, best, or the number of a step."
)
DATA = config_flags.DEFINE_config_dict(
    "data", default.get_config().data,
    "Other text than the run's validation split: --data.FIELD=VALUE.",
)
BATCHES = flags.DEFINE_integer(
    "batches", 0, "Batches to evaluate; 0 = the whole split.", lower_bound=0
)


def main() -> None:
  run = trained.load(WORKDIR.value, STEP.value)
  fields = config_lib.to_dict(run.config)
  fields["eval_batches"] = BATCHES.value
  fields["data"] |= config_flags.get_override_values(flags.FLAGS["data"])
  # Evaluating takes any number of devices that the batch divides over.
  fields["mesh"] = {"data": -1}
  config = config_lib.parse(fields)
  mesh = sharding.make_mesh(config)
  batches = pipeline.valid_batches(config, sharding.process_rows(config, mesh))
  result = evaluate.run(
      step.jitted(step.eval_step, config),
      run.variables["params"], run.variables["buffers"],
      (sharding.to_devices(batch, mesh) for batch in batches),
  )
  print(json.dumps({"step": run.step, **result}))


if __name__ == "__main__":
  cli.run(main)
