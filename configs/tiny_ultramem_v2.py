"""`tiny.py` with UltraMemV2 (arXiv 2508.18756): a memory in every block.

  python train.py --config=configs/tiny_ultramem_v2.py

The four memories share one table, a ring to which each adds a quarter of
`tiny.py`'s rows.
"""

from configs import tiny


def get_config():
  c = tiny.get_config()
  c.model.memory.update(
    kind="ultramem_v2",
    spans="full",
    num_keys=64,
    share_ratio=0.5,
    pre_value_dim=16,
  )
  return c
