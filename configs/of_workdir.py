"""The settings of the run that a workdir holds, as `train.py --workdir` uses.

python train.py --workdir=runs/a --config.steps=2000 --override
"""

from typing import Any

from configs import default
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.checks import require


def get_config(workdir: str = "") -> Any:
  """Returns the ConfigDict of a run.

  Args:
    workdir: of the run.
  Raises:
    ConfigError: it is not named, or holds no run.
  """
  require(
    bool(workdir),
    "--config=configs/of_workdir.py:DIR, DIR",
    workdir,
    "must name the workdir of a run",
  )
  c = default.get_config()
  c.update(config_lib.to_dict(workdir_lib.load_config(workdir)))
  return c
