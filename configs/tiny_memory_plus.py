"""`tiny.py` with Memory+ (arXiv 2412.09764): two layers share one table."""

from configs import tiny


def get_config():
  c = tiny.get_config()
  c.model.memory.update(kind="memory_plus", key_dim=32)
  return c
