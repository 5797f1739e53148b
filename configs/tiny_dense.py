"""The dense twin of `tiny.py`: no memory, but the same FLOPs per token.

  python train.py --config=configs/tiny_dense.py

It trains on what `tiny.py` trains on, for as many steps.
"""

from configs import tiny


def get_config():
  c = tiny.get_config()
  c.model.mlp_dim = 656
  c.model.memory.update(kind="none", spans="")
  return c
