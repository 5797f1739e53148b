"""UltraMem-151M-x12, all 1.86 G values of it, in 16 GiB of memory.

  python train.py --config=configs/151m_x12_16gib.py

Tables and their first moments in bfloat16, rounded at random, and one second
moment for each row: 4 bytes a value, where float32 with a dense update takes
16. The process takes 11.9 GiB at most, also when it saves, and 12.3 when it
goes on from a checkpoint (`python -m benchmarks.x12`). Trains on the embedded
corpus, byte level, 512 tokens a step; for another corpus set `data` and
`model.vocab_size` as `151m_x12.py` has them.
"""

import importlib


def get_config():
  c = importlib.import_module("configs.151m_x12").get_config()
  c.steps = 2000
  c.batch_size = 1
  c.log_every = 10
  c.eval_every = 1000
  c.eval_batches = 16
  c.data.update(
    source="stdlib",
    tokenizer="bytes",
    seq_len=512,
    packing="segments",
    cut_bytes=4096,
  )
  c.model.update(
    vocab_size=264, dropout_rate=0.0, dtype="float32", remat="none"
  )
  c.model.memory.storage.table_dtype = "bfloat16"
  c.optim.update(
    table_update="sparse", table_moments="bfloat16", table_second_moment="row"
  )
  return c
