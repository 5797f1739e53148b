"""MoE-151M-2in32: 2.04 B parameters, 0.35 GFLOPs per token.

  python train.py --config=configs/151m_moe_2in32.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

C4 validation loss in the paper (arXiv 2411.12364, table 1): 2.63.
The width of an expert is inferred from the parameters.
"""

from configs import published


def get_config():
  c = published.get_config("151m")
  c.model.moe.update(num_experts=32, top_k=2, expert_dim=2528)
  return c
