"""MoE-680M-2in33: 8.95 B parameters, 1.51 GFLOPs per token (paper: 1.50).

  python train.py --config=configs/680m_moe_2in33.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

C4 validation loss in the paper (arXiv 2411.12364, table 1): 2.39.
The width of an expert is inferred from the parameters.
"""

from configs import published


def get_config():
  c = published.get_config("680m")
  c.model.moe.update(num_experts=33, top_k=2, expert_dim=3584)
  return c
