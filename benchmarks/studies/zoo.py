"""The models that studies compare, by name.

All models of a setting have the same FLOPs of a token. Those with a table or
experts also have the same parameters, those of a mixture of 2 of 8 experts, or
of as many as the name says: "ultramem/32" is as large as a mixture of 2 of 32.
`fit` finds the widths and the rows that make it so.
"""

from collections.abc import Callable
from typing import NamedTuple

from benchmarks.studies.setting import Fields, Setting, Size
from configs import ablation, sweeps

EXPERTS = 8  # whose parameters a sparse model has, unless its name says others
CONV = 5  # taps
MULTIPLIERS = (10.0, 1.0, 30.0)  # of the rate of tables; the first is untuned


class Model(NamedTuple):
  """A model before its widths are fitted.

  fields: of `config.model`, those of the memory as "memory.FIELD".
  experts: the mixture with whose parameters it is compared; 0: it is dense.
  multipliers: of the tables' rate that are tried; the first one first.
  rows: of the table, whatever its parameters are then; 0: fitted.
  like: the model that it is with a change, whose best rates are its first.
  """

  fields: Fields
  experts: int = EXPERTS
  multipliers: tuple[float, ...] = MULTIPLIERS
  rows: int = 0
  like: str = ""


def read_blocks(size: Size) -> str:
  """Returns the blocks in which the memories of `spans` read, "i/j/..."."""
  return "/".join(span.split(":")[0] for span in spans(size).split("/"))


def spans(size: Size) -> str:
  """Returns spans of two blocks each, one after the other: "1:2/3:4/..."."""
  return "/".join(f"{i}:{i + 1}" for i in range(1, size.num_layers, 2))


def ultramem(size: Size) -> Fields:
  return memory(
    kind="ultramem",
    spans=spans(size),
    key_dim=size.embed_dim // 8,
    value_dim=size.embed_dim // 2,
    top_m=size.top_m,
  )


def pkm(size: Size) -> Fields:
  """One memory in the middle: the first row of the paper's ladder."""
  return memory(
    **ablation.ROWS["pkm"]
    | {
      "spans": f"{size.num_layers // 2}:{size.num_layers // 2}",
      "key_dim": size.embed_dim,
      "value_dim": size.embed_dim,
      "top_m": size.top_m,
    }
  )


def memory_plus(size: Size) -> Fields:
  return memory(
    kind="memory_plus",
    spans=spans(size),
    key_dim=size.embed_dim // 4,
    value_dim=size.embed_dim // 2,
    top_m=size.top_m,
  )


def peer(size: Size) -> Fields:
  middle = f"{size.num_layers // 2}:{size.num_layers // 2}"
  return memory(
    kind="peer",
    spans=middle,
    key_dim=size.embed_dim,
    value_dim=size.embed_dim,
    top_m=size.top_m,
  )


def ultramem_v2(size: Size) -> Fields:
  return memory(
    kind="ultramem_v2",
    spans="full",
    share_ratio=0.5,
    pre_value_dim=size.embed_dim // 8,
    key_dim=size.embed_dim // 8,
    value_dim=size.embed_dim // 2,
    top_m=size.top_m,
  )


def memory(**fields) -> Fields:
  return {f"memory.{name}": value for name, value in fields.items()}


def conv(size: Size, blocks: str = "") -> Fields:
  """The convolution before MLP or experts; where memories read by default."""
  return {"mlp_conv": CONV, "mlp_conv_blocks": blocks or read_blocks(size)}


def experts(count: int, top_k: int = 2) -> Fields:
  return {"moe.num_experts": count, "moe.top_k": top_k}


IN_QUERY, NOT_IN_QUERY = memory(query_conv=CONV), memory(query_conv=0)


def _dense(size: Size) -> dict[str, Model]:
  return {
    "dense": Model({}, 0, like="dense, conv"),
    "dense, conv": Model(conv(size), 0),
    "dense, conv in all blocks": Model(
      conv(size, "full"), 0, like="dense, conv"
    ),
  }


def _moe(size: Size) -> dict[str, Model]:
  first = "moe 2 of 8, conv"
  models = {
    "moe 2 of 8": Model(experts(8), like=first),
    "moe 2 of 32": Model(experts(32), 32, like=first),
    "moe 8 of 32": Model(experts(32, 8), like=first),
  }
  with_conv = {
    f"{name}, conv": model._replace(fields=model.fields | conv(size))
    for name, model in models.items()
  }
  with_conv[first] = with_conv[first]._replace(like="")
  return models | with_conv


def _memories(size: Size) -> dict[str, Model]:
  one_rate = MULTIPLIERS[1:2]
  ultra, v2 = ultramem(size), ultramem_v2(size)
  changed = {
    "ultramem, no conv": Model(ultra | NOT_IN_QUERY),
    "ultramem/32": Model(ultra, 32),
    "ultramem/32, no conv": Model(ultra | NOT_IN_QUERY, 32),
    "ultramem_v2": Model(v2),
    "ultramem_v2, no conv": Model(v2 | NOT_IN_QUERY),
  }
  # Product keys were published with one rate for all, which is tried first.
  keys = {
    "pkm": (pkm(size), IN_QUERY),
    "memory_plus": (memory_plus(size), conv(size)),
    "peer": (peer(size), IN_QUERY),
  }
  first, multipliers = "pkm, conv", (1.0, 10.0, 30.0)
  models = {"ultramem": Model(ultra)}
  models |= {k: v._replace(like="ultramem") for k, v in changed.items()}
  for name, (fields, with_conv) in keys.items():
    model = Model(fields, multipliers=multipliers, like=first)
    models[name] = model
    models[f"{name}, conv"] = model._replace(fields=fields | with_conv)
  models[first] = models[first]._replace(like="")
  models["pkm, conv before the MLP"] = models["pkm"]._replace(
    fields=models["pkm"].fields | conv(size)
  )
  return models | {
    "ultramem, one rate": Model(ultra, multipliers=one_rate, like="ultramem")
  }


def _anatomy(size: Size) -> dict[str, Model]:
  """Returns entries of UltraMem with one part changed."""
  ultra = ultramem(size)
  additive = memory(score="sum", num_cores=1, key_dim=size.embed_dim // 4)
  apart = "/".join(f"{block}:{block}" for block in read_blocks(size).split("/"))
  softmax = memory(softmax=True, init="official")
  changes = {
    "conv before the MLP": NOT_IN_QUERY | conv(size),
    "conv in both": conv(size),
    "no IVE": memory(expansion=1, shuffle="none"),
    "no TDQKR, no MCS": additive,
    "no MCS": memory(num_cores=1),
    "official init": memory(init="official"),
    "softmax, official init": softmax,
    "softmax, no conv": softmax | NOT_IN_QUERY,
    "softmax, conv before the MLP": softmax | NOT_IN_QUERY | conv(size),
    "no norm, official init": memory(query_key_norm="none", init="official"),
    "no skip": memory(spans=apart),
    "in all blocks": memory(spans="full"),
    "top-m doubled": memory(top_m=2 * size.top_m),
    "values twice as wide": memory(value_dim=size.embed_dim),
  }
  return {
    f"ultramem, {k}": Model(ultra | v, like="ultramem")
    for k, v in changes.items()
  }


def _ladder(size: Size) -> dict[str, Model]:
  """Returns the rows of table 2, shrunk: its shapes over those of its first."""
  rows = ablation.ROWS
  wide = rows["pkm"]["key_dim"]

  def shrunk(changes: Fields) -> Fields:
    fields = {k: v for k, v in changes.items() if k != "num_keys"}
    if "spans" in fields:
      split = "/" in str(fields["spans"])
      middle = size.num_layers // 2
      fields["spans"] = spans(size) if split else f"{middle}:{middle}"
    if "key_dim" in fields:
      # The keys of the first row are 2 D wide, those of a split memory D / 2.
      fields["key_dim"] = max(
        2, round(2 * size.embed_dim * fields["key_dim"] / wide)
      )
    if "value_dim" in fields:
      fields["value_dim"] = size.embed_dim * fields["value_dim"] // 1024
    if "top_m" in fields:
      fields["top_m"] = size.top_m * fields["top_m"] // 42
    return fields

  models, fields, multiplier = {}, {}, 1.0
  for name, changes in rows.items():
    fields = fields | memory(**shrunk(changes))
    if name == "lr_decay":
      multiplier = 10.0
    models[f"ladder {name}"] = Model(fields, multipliers=(multiplier,))
  return models


def _sweeps(size: Size) -> dict[str, Model]:
  """Returns the points of table 3, on the rows of the ladder they extend."""
  ladder, models = _ladder(size), {}
  for name, (row, changes) in sweeps.POINTS.items():
    base = ladder[f"ladder {row}"].fields
    fields = {k: v for k, v in changes.items() if k != "key_dim"}
    if "tucker_rank" in fields:
      width = base["memory.key_dim"]
      fields["key_dim"] = max(2, round(width / fields["tucker_rank"]))
    models[f"sweep {name}"] = Model(base | memory(**fields), multipliers=(1.0,))
  return models


ROWS = tuple(4**x * 1024 for x in range(1, 6))  # 4 k to 1 M


def _rows(size: Size) -> dict[str, Model]:
  """Returns UltraMem with other table sizes; keys are not made up for."""
  fields = ultramem(size) | {"mlp_dim": 3 * size.embed_dim}
  return {
    f"ultramem, {rows} rows": Model(fields, rows=rows, like="ultramem")
    for rows in ROWS
  }


FAMILIES: tuple[Callable[[Size], dict[str, Model]], ...] = (
  _dense,
  _moe,
  _memories,
  _anatomy,
  _ladder,
  _sweeps,
  _rows,
)


def models(setting: Setting) -> dict[str, Model]:
  """Returns all models of a setting, by name."""
  return {
    name: model
    for family in FAMILIES
    for name, model in family(setting.shape).items()
  }
