"""The sweeps of expansion, rank and cores (arXiv 2411.12364, table 3).

  python train.py --config=configs/sweeps.py:ive_9 \
      --config.data.tokenizer=gpt_neox/tokenizer.json

Each extends a row of `ablation.py`, its first value being that row itself.
Changes of the validation loss in the paper: ive 4, 9, 16 -0.017, -0.025,
-0.027; tdqkr 2, 3, 4 -0.008, -0.0084, -0.0082; mcs 2, 4, 8 -0.003, 0.001,
0.006.
"""

from configs import ablation
from ultramem_jax.settings.errors import ConfigError

KEY_WIDTH = 500  # per side and head, shared out between the ranks of a key
SWEEPS = {
  "ive": ("norm", {e: dict(expansion=e, shuffle="hash") for e in (4, 9, 16)}),
  "tdqkr": (
    "ive",
    {
      r: dict(score="tucker", tucker_rank=r, key_dim=round(KEY_WIDTH / r))
      for r in (2, 3, 4)
    },
  ),
  "mcs": ("tdqkr", {h: dict(num_cores=h) for h in (2, 4, 8)}),
}
POINTS = {
  f"{name}_{value}": (row, changes)
  for name, (row, values) in SWEEPS.items()
  for value, changes in {1: {}, **values}.items()
}


def get_config(point: str = ""):
  if point not in POINTS:
    raise ConfigError(
      f"--config=configs/sweeps.py:POINT, POINT = {point!r}: must be one of "
      f"{', '.join(POINTS)}"
    )
  row, changes = POINTS[point]
  c = ablation.get_config(row)
  c.model.memory.update(changes)
  return c
