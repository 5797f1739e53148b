"""PEER-151M (arXiv 2407.04153): 1.68 B parameters, 0.31 GFLOPs per token.

  python train.py --config=configs/151m_peer.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

746,496 one-neuron experts in two tables, together as large as the table of
`151m_pkm_x10.py`; 8 heads that read 16 experts each, as in the PEER paper. Not
a model of the UltraMem paper.
"""

from configs import ablation


def get_config():
  c = ablation.get_config("pkm")
  c.model.memory.update(
    kind="peer",
    num_keys=864,
    key_dim=128,
    num_heads=8,
    top_m=16,
    query_key_norm="layernorm",
  )
  return c
