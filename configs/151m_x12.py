"""UltraMem-151M-x12: 2.03 B parameters, 0.35 GFLOPs per token.

  python train.py --config=configs/151m_x12.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

C4 validation loss in the paper (arXiv 2411.12364, table 1): 2.67.
Keys and values are inferred from parameters and FLOPs.
"""

from configs import published


def get_config():
  c = published.get_config("151m")
  c.model.memory.update(
    kind="ultramem",
    spans="3:5/6:8/9:11",
    num_keys=1100,
    key_dim=250,
    value_dim=512,
    top_m=42,
  )
  return c
