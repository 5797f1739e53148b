"""UltraMem-1.6B-x12: 21.42 B parameters (paper: 21.41), 3.50 GFLOPs per token.

  python train.py --config=configs/1b6_x12.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

C4 validation loss in the paper (arXiv 2411.12364, table 1): 2.24.
Keys and values are inferred from parameters and FLOPs.
"""

from configs import published


def get_config():
  c = published.get_config("1b6")
  c.model.memory.update(
    kind="ultramem",
    spans="3:7/8:12/13:17/18:22/23:27/28:32",
    num_keys=1789,
    key_dim=400,
    value_dim=1024,
    top_m=42,
  )
  c.model.memory.storage.row_multiple = 1024
  return c
