"""Dense-680M: 0.68 B parameters, 1.36 GFLOPs per token.

  python train.py --config=configs/680m_dense.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

C4 validation loss in the paper (arXiv 2411.12364, table 1): 2.64.
"""

from configs import published


def get_config():
  return published.get_config("680m")
