"""UltraMem-151M-x12 (arXiv 2411.12364): 2.03 B parameters, 0.35 GFLOPs/token.

  python train.py --config=configs/151m_x12.py \
      --config.data.tokenizer=gpt_neox/tokenizer.json

The paper trains 238,418 steps of 2048 x 2048 tokens (1T, RedPajama) to a C4
validation loss of 2.67; the dense 151M model reaches 2.96.
"""

from configs import default


def get_config():
  c = default.get_config()
  c.steps = 238_418
  c.batch_size = 2048
  c.log_every = 100
  c.eval_every = 2000
  c.eval_batches = 64
  c.data.update(
      source="tfds", tfds_name="c4/en:3.0.1", seq_len=2048, packing="concat",
      tokenizer="tokenizer.json",
  )
  c.model.update(
      vocab_size=50_432, embed_dim=1024, num_layers=12, num_heads=16,
      mlp_dim=4096, dropout_rate=0.1, dtype="bfloat16", remat="block",
  )
  c.model.memory.update(
      kind="ultramem", spans="3:5/6:8/9:11", num_keys=1100, key_dim=250,
      value_dim=512, top_m=42,
  )
  c.optim.learning_rate = 6e-4
  return c
