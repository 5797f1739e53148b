"""The settings of another run, whose parameters a new one begins with.

  python train.py --config=configs/from_run.py:runs/smol --workdir=runs/mine \
    --config.model.memory.kind=ultramem --config.model.memory.spans=20:21 \
    --config.model.memory.output=zero --config.optim.trainable=memory
"""

import os
from typing import Any

from configs import default
from ultramem_jax.runs import inputs
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings import kinds
from ultramem_jax.settings.checks import require


def get_config(workdir: str = "") -> Any:
  """Returns the ConfigDict of a run, with init_from and its own tokenizer.

  Args:
    workdir: of the run; DIR@STEP or DIR@best names a checkpoint of it.
  Raises:
    ConfigError: it is not named, or holds no run.
  """
  require(
    bool(workdir),
    "--config=configs/from_run.py:DIR, DIR",
    workdir,
    "must name the workdir of a run",
  )
  folder, _ = workdir_lib.split_step(workdir)
  held = inputs.own_tokenizer(workdir_lib.load_config(folder), folder)
  c = default.get_config()
  fields = config_lib.to_dict(held)
  memory = fields["model"]["memory"]
  for field, value in kinds.DEFAULTS[memory["kind"]].items():
    # Left open, so that another kind has its own.
    if memory[field] == value:
      memory[field] = kinds.OWN
  c.update(fields)
  c.init_from, c.init_skip = os.fspath(workdir), ""
  return c
