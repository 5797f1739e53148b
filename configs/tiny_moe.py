"""The mixture-of-experts twin of `tiny.py`: 2 of 8 experts, the same FLOPs.

  python train.py --config=configs/tiny_moe.py

It trains on what `tiny.py` trains on, for as many steps.
"""

from configs import tiny_dense


def get_config():
  c = tiny_dense.get_config()
  c.model.moe.update(num_experts=8, top_k=2, expert_dim=328)
  return c
