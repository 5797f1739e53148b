"""Dense-6.5B: 6.44 B parameters, 12.88 GFLOPs per token.

  python train.py --config=configs/6b5_dense.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

C4 validation loss in the paper (arXiv 2411.12364, table 1): 2.30.
"""

from configs import published


def get_config():
  return published.get_config("6b5")
