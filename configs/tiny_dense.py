"""The dense twin of `tiny.py`: same FLOPs per token, no memory."""

from configs import tiny


def get_config():
  c = tiny.get_config()
  c.model.mlp_dim = 656
  c.model.memory.update(kind="none", spans="")
  return c
