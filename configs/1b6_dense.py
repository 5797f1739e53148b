"""Dense-1.6B: 1.61 B parameters, 3.22 GFLOPs per token (paper: 3.21).

  python train.py --config=configs/1b6_dense.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

C4 validation loss in the paper (arXiv 2411.12364, table 1): 2.49.
"""

from configs import published


def get_config():
  return published.get_config("1b6")
