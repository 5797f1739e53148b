"""The mixture-of-experts twin of `tiny.py`: same FLOPs per token, 2 of 8."""

from configs import tiny_dense


def get_config():
  c = tiny_dense.get_config()
  c.model.moe.update(num_experts=8, top_k=2, expert_dim=328)
  return c
