"""Dense-151M: 0.15 B parameters, 0.30 GFLOPs per token.

  python train.py --config=configs/151m_dense.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

C4 validation loss in the paper (arXiv 2411.12364, table 1): 2.96.
"""

from configs import published


def get_config():
  return published.get_config("151m")
