"""A memory that is added to a pretrained model: where, of what form."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from configs import ablation

Overrides = Mapping[str, Any]

# Depths of the blocks with a memory, as a share of all: subjects of facts are
# recognized early (arXiv 2202.05262).
ONE_PLACE = (0.3,)
THREE_PLACES = (0.2, 0.3, 0.5)
EARLY_PLACES = (0.1, 0.2, 0.3)
SIX_PLACES = (0.1, 0.2, 0.3, 0.45, 0.6, 0.75)
TEN_PLACES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COLD, WARM, TAUGHT = "cold", "warm", "taught"
# Plain product keys, with a table and normalized queries in each place.
PRODUCT_KEYS = "product_keys"
_PRODUCT_KEYS = {
  field: ablation.ROWS["pkm"][field]
  for field in (
    "kind",
    "heads_per_query",
    "score",
    "softmax",
    "num_cores",
    "expansion",
    "shuffle",
    "init",
  )
}


def block_at(depth: float, num_layers: int) -> int:
  """Returns the block at a share of the depth, counted from 1."""
  return max(1, round(depth * num_layers))


@dataclasses.dataclass(frozen=True)
class Memory:
  """A memory that is added, and how it is trained.

  kind: of `model.memory.kind`, or `PRODUCT_KEYS`.
  places: depths of the blocks to which it is added.
  reads: depths of the blocks where it reads; (): the same.
  query_conv: taps of the convolution in the queries of `PRODUCT_KEYS`.
  num_keys: the table has num_keys^2 rows.
  top_m: rows that each of 4 heads reads.
  output: what it adds at first, `model.memory.output`.
  gate: `model.memory.gate`.
  base: what the base has learned: nothing, `COLD`; general text, `WARM`; facts
    about others, with general text mixed in, `TAUGHT`.
  distillation: of a warm base's training, `optim.distillation`.
  """

  kind: str = "memory_plus"
  places: tuple[float, ...] = ONE_PLACE
  reads: tuple[float, ...] = ()
  query_conv: int = 0
  num_keys: int = 128
  top_m: int = 16
  output: str = "empty"
  gate: str = "none"
  base: str = COLD
  distillation: float = 0.0

  @property
  def name(self) -> str:
    """What tells its base from those of others."""
    places, reads = (
      "-".join(f"{x:.2g}" for x in depths)
      for depths in (self.places, self.reads)
    )
    base = self.base
    if self.distillation:
      base += f"_distilled_{self.distillation:g}"
    kind = self.kind + f"_{self.query_conv}" * bool(self.query_conv)
    places += f"_of_{reads}" * bool(reads)
    table = f"{self.num_keys}_{self.top_m}"
    return f"{kind}_{places}_{table}_{self.output}_{self.gate}_{base}"

  def overrides(self, num_layers: int, embed_dim: int) -> Overrides:
    """Returns the fields of the model's config."""
    # By where it reads: in one block, one memory does.
    spans = {
      block_at(read, num_layers): block_at(place, num_layers)
      for read, place in zip(
        self.reads or self.places, self.places, strict=True
      )
    }
    kind = {"model.memory.kind": self.kind}
    if self.kind == PRODUCT_KEYS:
      kind = {f"model.memory.{k}": v for k, v in _PRODUCT_KEYS.items()}
      kind["model.memory.query_conv"] = self.query_conv
    return {
      **kind,
      "model.memory.spans": "/".join(f"{i}:{j}" for i, j in spans.items()),
      "model.memory.num_keys": self.num_keys,
      "model.memory.key_dim": 32,
      "model.memory.value_dim": embed_dim // 2,
      "model.memory.top_m": self.top_m,
      "model.memory.num_heads": 4,
      "model.memory.output": self.output,
      "model.memory.gate": self.gate,
      # One of the two must not be zero, for either to have a gradient.
      "model.memory.gate_init": "zero" if self.output == "plain" else "open",
    }
