"""Evaluates the model of a workdir: loss, perplexity and bits per byte.

  python eval.py --workdir=runs/tiny
  python eval.py --workdir=runs/tiny --step=best \
      --data.source=text --data.valid_path='books/*.txt'

The result is one line of JSON. The run's mesh is used as far as these devices
make it; --mesh.table=8 and the like name another, --coordinator other hosts
(docs/sharding.md).
"""

import json

from absl import flags
from ml_collections import config_flags

from configs import default
from ultramem_jax import cli, distributed, evaluate, trained
from ultramem_jax import config as config_lib

cli.define_section(
    "data", default.get_config().data,
    "Other text than the run's validation split: --data.FIELD=VALUE.",
)
BATCHES = flags.DEFINE_integer(
    "batches", 0, "Batches to evaluate; 0 = the whole split.", lower_bound=0
)
trained.define_flags()
distributed.define_flags()


def main() -> None:
  distributed.initialize()
  run = trained.from_flags()
  fields = config_lib.to_dict(run.config)
  fields["eval_batches"] = BATCHES.value
  fields["data"] |= config_flags.get_override_values(flags.FLAGS["data"])
  validate = evaluate.on_validation_split(config_lib.parse(fields), run.layout)
  result = validate(run.variables["params"], run.variables["buffers"])
  print(json.dumps({"step": run.step, **result}))


if __name__ == "__main__":
  cli.run(main)
