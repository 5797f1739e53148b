"""From PKM to UltraMem at 151M, one change per row.

The rows of table 2 of the paper (arXiv 2411.12364):

  python train.py --config=configs/ablation.py:tdqkr \
      --config.data.tokenizer=gpt_neox/tokenizer.json

Each row keeps the changes of the rows before it. C4 validation losses in the
paper: pkm 2.828, no_softmax 2.822, half_width 2.800, shared_query 2.803, split
2.788, norm 2.789, ive 2.772, tdqkr 2.764, mcs 2.761, init 2.758, lr_decay
2.736, conv 2.736.
"""

from configs import published
from ultramem_jax.settings.checks import require

# What each row changes in model.memory, shapes inferred from the parameters
# of the table: about 1.53 G in every row.
ROWS = {
  "pkm": dict(
    kind="ultramem",
    spans="6:6",
    num_keys=1224,
    key_dim=2448,
    value_dim=1024,
    top_m=21,
    num_heads=2,
    heads_per_query=1,
    score="sum",
    softmax=True,
    num_cores=1,
    expansion=1,
    shuffle="none",
    value_projection=False,
    query_key_norm="none",
    query_conv=0,
    init="official",
  ),
  "no_softmax": dict(softmax=False),
  "half_width": dict(num_keys=1728, value_dim=512, value_projection=True),
  "shared_query": dict(heads_per_query=2),
  "split": dict(spans="3:5/6:8/9:11", num_keys=1000, key_dim=500, top_m=42),
  "norm": dict(query_key_norm="layernorm"),
  "ive": dict(expansion=4, shuffle="hash"),
  "tdqkr": dict(score="tucker", tucker_rank=2, key_dim=250),
  "mcs": dict(num_cores=2),
  "init": dict(init="paper"),
  "lr_decay": {},  # the one change outside model.memory: see below
  "conv": dict(query_conv=5),
}


def get_config(row: str = ""):
  require(
    row in ROWS,
    "--config=configs/ablation.py:ROW, ROW",
    row,
    f"must be one of {', '.join(ROWS)}",
  )
  c = published.get_config("151m")
  c.optim.value_lr_multiplier = 1.0
  rows = list(ROWS)
  for name in rows[: rows.index(row) + 1]:
    c.model.memory.update(ROWS[name])
    if name == "lr_decay":
      c.optim.value_lr_multiplier = 10.0
  return c
