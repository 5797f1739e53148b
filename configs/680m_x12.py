"""UltraMem-680M-x12: 8.93 B parameters, 1.49 GFLOPs per token.

  python train.py --config=configs/680m_x12.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

C4 validation loss in the paper (arXiv 2411.12364, table 1): 2.37.
Keys and values are inferred from parameters and FLOPs.
"""

from configs import published


def get_config():
  c = published.get_config("680m")
  c.model.memory.update(
    kind="ultramem",
    spans="3:7/8:12/13:17/18:22",
    num_keys=1632,
    key_dim=360,
    value_dim=768,
    top_m=42,
  )
  return c
