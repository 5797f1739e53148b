"""The default: a small UltraMem language model of Python source.

  python train.py --config=configs/tiny.py

Trains on the standard library of the running interpreter, at byte level, in
three minutes on two CPU cores. `python -m benchmarks.tiny` compares it
with its twins.
"""

from configs import default


def get_config():
  c = default.get_config()
  c.steps = 300
  c.batch_size = 8
  c.eval_every = 300
  c.checkpoint.every = 100
  c.data.update(seq_len=256, cut_bytes=2048)
  c.model.update(embed_dim=128, num_layers=4, num_heads=4, mlp_dim=512)
  c.model.memory.update(
    kind="ultramem",
    spans="1:2/3:4",
    num_keys=128,
    key_dim=16,
    value_dim=64,
    top_m=16,
  )
  c.optim.update(learning_rate=2e-3, warmup_fraction=0.05)
  return c
