"""`tiny.py` with Memory+ (arXiv 2412.09764): two memories share one table.

  python train.py --config=configs/tiny_memory_plus.py

It trains on what `tiny.py` trains on, for as many steps.
"""

from configs import tiny


def get_config():
  c = tiny.get_config()
  c.model.memory.update(kind="memory_plus", key_dim=32)
  return c
