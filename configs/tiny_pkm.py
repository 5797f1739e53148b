"""The product-key twin of `tiny.py`: same table and FLOPs, one plain memory."""

from configs import ablation, tiny


def get_config():
  c = tiny.get_config()
  c.model.memory.update(ablation.ROWS["pkm"])
  c.model.memory.update(
    spans="2:2", num_keys=128, key_dim=144, value_dim=128, top_m=16
  )
  c.optim.value_lr_multiplier = 1.0
  return c
