"""MoE-1.6B-2in34: 21.36 B parameters, 3.53 GFLOPs per token (paper: 3.52).

  python train.py --config=configs/1b6_moe_2in34.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

C4 validation loss in the paper (arXiv 2411.12364, table 1): 2.30.
The width of an expert is inferred from the parameters.
"""

from configs import published


def get_config():
  c = published.get_config("1b6")
  c.model.moe.update(num_experts=34, top_k=2, expert_dim=4672)
  return c
