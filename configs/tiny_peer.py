"""The PEER twin of `tiny.py` (arXiv 2407.04153): 8100 one-neuron experts.

  python train.py --config=configs/tiny_peer.py

It trains on what `tiny.py` trains on, for as many steps.
"""

from configs import tiny_pkm


def get_config():
  c = tiny_pkm.get_config()
  c.model.memory.update(
    kind="peer", num_keys=90, key_dim=168, query_key_norm="layernorm"
  )
  return c
