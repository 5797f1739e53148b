"""The product-key twin of `tiny.py`: one memory, the same table and FLOPs.

  python train.py --config=configs/tiny_pkm.py

It trains on what `tiny.py` trains on, for as many steps.
"""

from configs import ablation, tiny


def get_config():
  c = tiny.get_config()
  c.model.memory.update(ablation.ROWS["pkm"])
  c.model.memory.update(
    spans="2:2", num_keys=128, key_dim=144, value_dim=128, top_m=16
  )
  c.optim.value_lr_multiplier = 1.0
  return c
