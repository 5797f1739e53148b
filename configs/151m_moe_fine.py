"""MoE-151M, 8 of 128 fine experts: 2.04 B parameters, 0.35 GFLOPs per token.

  python train.py --config=configs/151m_moe_fine.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

The parameters and FLOPs of `151m_moe_2in32.py` in experts of a quarter of the
width, as fine-grained mixtures have them. Not a model of the UltraMem paper.
"""

from configs import published


def get_config():
  c = published.get_config("151m")
  c.model.moe.update(num_experts=128, top_k=8, expert_dim=632)
  return c
