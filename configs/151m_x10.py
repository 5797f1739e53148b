"""UltraMem-151M-x10: 1.71 B parameters, 0.35 GFLOPs per token.

  python train.py --config=configs/151m_x10.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

C4 validation loss in the paper (arXiv 2411.12364, table 2): 2.736.
The last row of `ablation.py`.
"""

from configs import ablation


def get_config():
  return ablation.get_config("conv")
