"""The settings of a memory layer, for models of one's own as for a run."""

import dataclasses
import math

from ultramem_jax.settings.checks import (
  require,
  require_at_least,
  require_choice,
  require_positive,
  require_types,
)

MAX_GRID_SIDE = 46340  # the largest s with s * s - 1 representable in int32

# Fields of MemoryConfig that a kind of memory fixes: a config of that kind
# sets them so.
KIND_SETTINGS = {
  "memory_plus": {
    "score": "sum",
    "softmax": True,
    "num_cores": 1,
    "heads_per_query": 1,
    "expansion": 1,
    "shuffle": "none",
    "query_conv": 0,
    "init": "official",
  },
  "ultramem_v2": {"value_projection": True, "init": "official"},
  # A row is a neuron of the model's own width.
  "peer": {"value_projection": False, "num_cores": 1, "expansion": 1},
}

# Fields that one kind alone reads: with another they keep their defaults.
KIND_FIELDS = {
  "ultramem_v2": (
    "share_ratio",
    "ring_layers",
    "pre_value_dim",
    "pre_activation",
  ),
  "memory_plus": ("input_gate", "output_gate"),
}


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """One memory layer (UltraMem, arXiv 2411.12364); defaults are the paper's.

  The switches of the paper's ablation ladder are all here, so that plain
  product-key memory is a setting: `score="sum"`, `softmax=True`,
  `expansion=1`, `num_cores=1`, `heads_per_query=1`, `query_key_norm="none"`,
  `query_conv=0`, `shuffle="none"`, `init="official"`. Some kinds fix some of
  them (`KIND_SETTINGS`). Every field is explained in `configs/default.py`.
  """

  num_keys: int
  key_dim: int
  value_dim: int
  top_m: int
  num_heads: int = 2
  heads_per_query: int = 2
  query_per_rank: bool = True
  score: str = "tucker"
  tucker_rank: int = 2
  num_cores: int = 2
  softmax: bool = False
  expansion: int = 4
  shuffle: str = "hash"
  value_projection: bool = True
  query_key_norm: str = "layernorm"
  norm_bias: bool = False
  norm_eps: float = 1e-5
  query_conv: int = 5
  init: str = "paper"
  aux_loss_weight: float = 0.001
  aux_loss_margin: float = 0.15
  num_projections: int = 0
  query_bias: bool = False
  projection_bias: bool = False
  share_ratio: float = 1.0
  ring_layers: int = 0
  pre_value_dim: int = 0
  pre_activation: str = "none"
  spare_queries: int = 0
  input_gate: bool = True
  output_gate: bool = False
  partition: str = "auto"
  row_multiple: int = 1
  table_dtype: str = "float32"
  kernel: str = "xla"
  kind: str = "ultramem"
  spans: str = ""

  @property
  def shares_table(self) -> bool:
    """Whether all memories of a model read one table."""
    return self.kind in ("memory_plus", "ultramem_v2")

  @property
  def num_rows(self) -> int:
    """I: physical rows of the table, n^2; n^2 for each memory of a ring."""
    ring = self.ring_layers if self.kind == "ultramem_v2" else 1
    return self.num_keys**2 * max(ring, 1)

  @property
  def stored_rows(self) -> int:
    """Rows that a table is stored with; those beyond I are never read."""
    return self._stored(self.num_rows)

  @property
  def stored_slots(self) -> int:
    """Counters of a memory's slots; those beyond N^2 stay zero."""
    return self._stored(self.grid_side**2)

  def _stored(self, count: int) -> int:
    return self.row_multiple * -(-count // self.row_multiple)

  @property
  def table_side(self) -> int:
    """Side of the square of rows that a memory reaches: n, or on a ring more.

    The authors' rounding: int(sqrt(I * share_ratio)).
    """
    if self.kind != "ultramem_v2":
      return self.num_keys
    return int((self.num_rows * self.share_ratio) ** 0.5)

  @property
  def grid_side(self) -> int:
    """N: keys on one side of the grid, sqrt(E) * n."""
    return math.isqrt(self.expansion) * self.table_side

  @property
  def projections(self) -> int:
    """Projections of the pooled values: E, one per block, or one for all."""
    if self.kind == "ultramem_v2":
      return self.num_projections or 1
    return self.num_projections or self.expansion

  @property
  def rank(self) -> int:
    """R: vectors per key; 1 for the additive score of product keys."""
    return self.tucker_rank if self.score == "tucker" else 1

  @property
  def num_queries(self) -> int:
    """G: distinct queries; head a reads query a // heads_per_query."""
    return -(-self.num_heads // self.heads_per_query) + self.spare_queries

  def require_width(self, embed_dim: int) -> None:
    """Raises ConfigError if the output cannot have the width embed_dim."""
    require(
      self.value_projection or self.value_dim == embed_dim,
      "model.memory.value_dim",
      self.value_dim,
      f"must equal embed_dim = {embed_dim} without value_projection",
    )

  def __post_init__(self):
    path = "model.memory"
    require_types(path, self)
    require_choice(
      path,
      self,
      "kind",
      "none",
      "ultramem",
      "ultramem_v2",
      "memory_plus",
      "peer",
    )
    for field, fixed in KIND_SETTINGS.get(self.kind, {}).items():
      value = getattr(self, field)
      require(
        value == fixed,
        f"{path}.{field}",
        value,
        f"must be {fixed!r} with kind = {self.kind!r}",
      )
    self._require_fields_of_this_kind(path)
    require_at_least(
      path,
      self,
      1,
      "num_keys",
      "key_dim",
      "value_dim",
      "top_m",
      "num_heads",
      "heads_per_query",
      "tucker_rank",
      "num_cores",
      "expansion",
      "row_multiple",
    )
    require_at_least(
      path,
      self,
      0,
      "query_conv",
      "aux_loss_weight",
      "aux_loss_margin",
      "ring_layers",
      "pre_value_dim",
      "spare_queries",
    )
    require_positive(path, self, "norm_eps")
    self._require_choices(path)
    require(
      math.isqrt(self.expansion) ** 2 == self.expansion,
      f"{path}.expansion",
      self.expansion,
      "must be a perfect square",
    )
    require(
      self.num_projections in (0, 1, self.expansion),
      f"{path}.num_projections",
      self.num_projections,
      f"must be 0 (the kind's own), 1 or expansion = {self.expansion}",
    )
    require(
      0 < self.share_ratio <= 1,
      f"{path}.share_ratio",
      self.share_ratio,
      "must lie in (0, 1]: the share of the ring that a memory reaches",
    )
    if self.kind != "ultramem_v2" or self.ring_layers:
      self._require_grid(path)
    require(
      self.value_dim % self.num_cores == 0,
      f"{path}.value_dim",
      self.value_dim,
      f"must be divisible by num_cores = {self.num_cores}",
    )
    require(
      self.num_heads % self.heads_per_query == 0
      or self.spare_queries > 0
      or self.kind == "ultramem_v2",
      f"{path}.heads_per_query",
      self.heads_per_query,
      f"must divide num_heads = {self.num_heads}",
    )
    require(
      self.score == "tucker" or self.num_cores == 1,
      f"{path}.num_cores",
      self.num_cores,
      "must be 1 with score = 'sum', which has no core",
    )
    require(
      self.projections == 1 or self.value_projection,
      f"{path}.value_projection",
      self.value_projection,
      f"must be True with {self.projections} projections: each block of the "
      "table has its own",
    )
    require(
      self.init == "official"
      or (self.query_key_norm != "none" and not self.softmax),
      f"{path}.init",
      self.init,
      "'paper' calibrates the query norm for scores used as they are: "
      "needs query_key_norm and no softmax, or choose 'official'",
    )

  def _require_fields_of_this_kind(self, path):
    for kind, fields in KIND_FIELDS.items():
      for field in fields if self.kind not in (kind, "none") else ():
        # As a class attribute stands a field's default.
        value, default = getattr(self, field), getattr(MemoryConfig, field)
        require(
          value == default,
          f"{path}.{field}",
          value,
          f"is for kind = {kind!r}; must be {default!r} with "
          f"kind = {self.kind!r}",
        )

  def _require_choices(self, path):
    require_choice(path, self, "score", "tucker", "sum")
    require_choice(path, self, "shuffle", "hash", "permutation", "none")
    require_choice(path, self, "query_key_norm", "layernorm", "rms", "none")
    require_choice(path, self, "init", "paper", "official")
    require_choice(path, self, "pre_activation", "none", "gelu")
    require_choice(
      path,
      self,
      "partition",
      "auto",
      "columns",
      "rows",
      "rows_pooled",
      "rows_unpooled",
    )
    require_choice(path, self, "table_dtype", "float32", "bfloat16", "int8")
    require_choice(path, self, "kernel", "xla", "pallas")

  def _require_grid(self, path):
    require(
      1 <= self.grid_side <= MAX_GRID_SIDE,
      f"{path}.num_keys",
      self.num_keys,
      f"sqrt(expansion) * num_keys = {self.grid_side} must be "
      f"at most {MAX_GRID_SIDE}, so that a cell fits in int32",
    )
    # A ring adds a memory's first row before it goes around its end.
    ring = 2 if self.kind == "ultramem_v2" else 1
    count = max(self.projections, ring) * self.stored_rows
    require(
      count <= 2**31,
      f"{path}.num_keys",
      self.num_keys,
      f"makes {count} places of rows, which must be at most 2^31, so that "
      "one fits in int32",
    )
    require(
      self.top_m <= self.grid_side,
      f"{path}.top_m",
      self.top_m,
      f"must be at most the keys of a side, sqrt(expansion) * num_keys = "
      f"{self.grid_side}",
    )
