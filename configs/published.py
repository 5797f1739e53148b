"""What the published models share: their training and their dense sizes.

UltraMem (arXiv 2411.12364), section 4: 238,418 steps of 2048 x 2048 tokens (1T
tokens of RedPajama), validated on C4, with the GPT-NeoX tokenizer. These
configs also train on C4. The number of attention heads is not published; ours
have width 64 (151M) or 128. For the memory that a config needs per device:

  python -m ultramem_jax accounting --config=configs/151m_x12.py
"""

from configs import default

MODELS = {
  "151m": dict(embed_dim=1024, num_layers=12, num_heads=16, mlp_dim=4096),
  "680m": dict(embed_dim=1536, num_layers=24, num_heads=12, mlp_dim=6144),
  "1b6": dict(embed_dim=2048, num_layers=32, num_heads=16, mlp_dim=8192),
  "6b5": dict(embed_dim=4096, num_layers=32, num_heads=32, mlp_dim=16384),
}
LEARNING_RATES = {"151m": 6e-4, "680m": 2.5e-4, "1b6": 2e-4, "6b5": 1.2e-4}


def get_config(size: str = "151m"):
  """Returns the dense model of a size; variants add experts or memories."""
  c = default.get_config()
  c.steps = 238_418
  c.batch_size = 2048
  c.log_every = 100
  c.eval_every = 2000
  c.eval_batches = 64
  c.data.update(
    source="tfds",
    tfds_name="c4/en:3.0.1",
    seq_len=2048,
    packing="concat",
    tokenizer="tokenizer.json",
  )
  c.model.update(
    vocab_size=50_432,
    dropout_rate=0.1,
    dtype="bfloat16",
    remat="block",
    **MODELS[size],
  )
  c.optim.learning_rate = LEARNING_RATES[size]
  return c
