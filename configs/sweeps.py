"""The sweeps of expansion, rank and cores: table 3 of the paper.

  python train.py --config=configs/sweeps.py:ive_9 \
      --config.data.tokenizer=gpt_neox/tokenizer.json

Each sweep extends a row of `ablation.py`; its value 1 is that row itself.
Changes of the validation loss in the paper: ive 4, 9, 16 -0.017, -0.025,
-0.027; tdqkr 2, 3, 4 -0.008, -0.0084, -0.0082; mcs 2, 4, 8 -0.003, 0.001,
0.006.
"""

from configs import ablation
from ultramem_jax.settings.checks import require

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
  require(
    point in POINTS,
    "--config=configs/sweeps.py:POINT, POINT",
    point,
    f"must be one of {', '.join(POINTS)}",
  )
  row, changes = POINTS[point]
  c = ablation.get_config(row)
  c.model.memory.update(changes)
  return c
