"""UltraMem-151M-x12 with all of its 1.86 G values, in 16 GiB of memory.

  python train.py --config=configs/151m_x12_16gib.py

Tables and their first moments are bfloat16, rounded at random, with one second
moment per row: 4 bytes per value, where float32 with a dense update takes 16.
The process takes at most 11.9 GiB, also while it saves, and 12.3 GiB when it
resumes; a step takes 10 s on two CPU cores (`python -m benchmarks.x12`). It
trains on the bytes of Python source, 512 tokens per step. For another
corpus set `data` and `model.vocab_size` as in `151m_x12.py`.
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
