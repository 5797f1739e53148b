"""The settings of a memory layer, for your own model as for a run."""

import dataclasses
import math

from ultramem_jax.settings import kinds
from ultramem_jax.settings.checks import (
  named,
  require,
  require_at_least,
  require_choice,
  require_norm_eps,
  require_types,
)
from ultramem_jax.settings.imported import ImportedWeights
from ultramem_jax.settings.kinds import OWN
from ultramem_jax.settings.storage import TableStorage

MAX_GRID_SIDE = 46340  # the largest s with s * s - 1 representable in int32

_PATH = "model.memory"


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """One memory layer (UltraMem, arXiv 2411.12364).

  A field that is left at None (`OWN`) takes the value that its kind has for it
  (`kinds.DEFAULTS`); once built, a config holds that value. Plain product-key
  memory is kind "ultramem" with every step of the paper's ablation undone:
  `configs/ablation.py`, row "pkm". Every field is explained in
  `configs/default.py`.

  Raises:
    ConfigError: a value is out of range, or contradicts the kind.
  """

  num_keys: int
  key_dim: int
  value_dim: int
  top_m: int
  kind: str = "ultramem"
  spans: str = ""
  num_heads: int = 2
  heads_per_query: int = OWN
  query_per_rank: bool = True
  score: str = OWN
  tucker_rank: int = 2
  num_cores: int = OWN
  softmax: bool = OWN
  expansion: int = OWN
  shuffle: str = OWN
  value_projection: bool = OWN
  shared_projection: bool = OWN
  query_key_norm: str = "layernorm"
  norm_eps: float = 1e-5
  query_conv: int = OWN
  init: str = OWN
  aux_loss_weight: float = 0.001
  aux_loss_margin: float = 0.15
  share_ratio: float = 1.0
  ring_layers: int = 0
  pre_value_dim: int = 0
  pre_activation: str = "none"
  input_gate: bool = OWN
  output: str = "plain"
  gate: str = "none"
  gate_init: str = "zero"
  replace_mlp: bool = False
  storage: TableStorage = dataclasses.field(default_factory=TableStorage)
  imported: ImportedWeights = dataclasses.field(default_factory=ImportedWeights)

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
    return self.storage.stored(self.num_rows)

  @property
  def stored_slots(self) -> int:
    """Counters of a memory's slots; those beyond N^2 stay zero."""
    return self.storage.stored(self.grid_side**2)

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
    """Projections of the pooled values: E, or 1 that all values share."""
    return 1 if self.shared_projection else self.expansion

  @property
  def rank(self) -> int:
    """R: vectors per key; 1 for the additive score of product keys."""
    return self.tucker_rank if self.score == "tucker" else 1

  @property
  def reads(self) -> int:
    """m A: rows that a token reads in one place, of all heads together."""
    return self.top_m * self.num_heads

  @property
  def num_queries(self) -> int:
    """Distinct queries; head a reads query a // heads_per_query."""
    read = -(-self.num_heads // self.heads_per_query)
    return read + self.imported.spare_queries

  def require_width(self, embed_dim: int) -> None:
    """Raises ConfigError if the output cannot have the width embed_dim."""
    require(
      self.value_projection or self.value_dim == embed_dim,
      named(_PATH, "value_dim"),
      self.value_dim,
      f"must equal model.embed_dim = {embed_dim} without value_projection",
    )

  def __post_init__(self):
    require_choice(_PATH, self, "kind", *kinds.DEFAULTS)
    for field, value in kinds.DEFAULTS[self.kind].items():
      if getattr(self, field) is OWN:
        object.__setattr__(self, field, value)
    require_types(_PATH, self)
    self._require_what_the_kind_fixes()
    self._require_ranges()
    self._require_choices()
    self._require_structure()
    self._require_output()
    # A model fills in ring_layers = 0, and then checks the grid.
    if self.kind != "ultramem_v2" or self.ring_layers:
      self.require_grid()

  def _require_what_the_kind_fixes(self):
    defaults = kinds.DEFAULTS[self.kind]
    for field in kinds.FIXED[self.kind]:
      value = getattr(self, field)
      require(
        value == defaults[field],
        named(_PATH, field),
        value,
        f"must be {defaults[field]!r} with kind = {self.kind!r}",
      )
    if self.kind == "none":
      return
    for field, kind in kinds.READ_BY.items():
      # A class holds the default of a field as its attribute.
      default = defaults.get(field, getattr(MemoryConfig, field))
      value = getattr(self, field)
      require(
        self.kind == kind or value == default,
        named(_PATH, field),
        value,
        f"is for kind = {kind!r}; must be {default!r} with "
        f"kind = {self.kind!r}",
      )
    require(
      self.kind == "memory_plus" or not self.imported.output_gate,
      named(_PATH, "imported.output_gate"),
      self.imported.output_gate,
      f"is for kind = 'memory_plus'; must be False with kind = {self.kind!r}",
    )

  def _require_ranges(self):
    require_at_least(
      _PATH,
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
    )
    require_at_least(
      _PATH,
      self,
      0,
      "query_conv",
      "aux_loss_weight",
      "aux_loss_margin",
      "ring_layers",
      "pre_value_dim",
    )
    require_norm_eps(_PATH, self)
    require(
      0 < self.share_ratio <= 1,
      named(_PATH, "share_ratio"),
      self.share_ratio,
      "must lie in (0, 1]: the share of the ring that a memory reaches",
    )

  def _require_choices(self):
    require_choice(_PATH, self, "score", "tucker", "sum")
    require_choice(_PATH, self, "shuffle", "hash", "permutation", "none")
    require_choice(_PATH, self, "query_key_norm", "layernorm", "rms", "none")
    require_choice(_PATH, self, "init", "paper", "official")
    require_choice(_PATH, self, "pre_activation", "none", "gelu")
    require_choice(_PATH, self, "output", "plain", "zero", "empty")
    require_choice(_PATH, self, "gate", "none", "scalar", "input")
    require_choice(_PATH, self, "gate_init", "zero", "open")

  def _require_output(self):
    """Requires that what is added to the model can learn."""
    require(
      self.output != "zero" or self.value_projection,
      named(_PATH, "output"),
      self.output,
      "needs value_projection, which starts at zero; a gate needs none",
    )
    require(
      self.output == "plain" or self.gate == "none" or self.gate_init == "open",
      named(_PATH, "gate_init"),
      self.gate_init,
      f"must be 'open' with output = {self.output!r}: in a product of two "
      "zeros, neither factor has a gradient",
    )
    require(
      self.output != "empty" or self.kind != "peer",
      named(_PATH, "output"),
      self.output,
      "is for memories that sum rows; with kind = 'peer' set a gate",
    )
    require(
      self.init != "paper" or self.kind != "peer",
      named(_PATH, "init"),
      self.init,
      "calibrates sums of rows by scores alone: must be 'official' with kind "
      "= 'peer'",
    )
    require(
      self.pre_activation == "none" or self.pre_value_dim > 0,
      named(_PATH, "pre_activation"),
      self.pre_activation,
      "is of pre-values: must be 'none' with pre_value_dim = 0",
    )

  def _require_structure(self):
    """Requires fields to fit together."""
    require(
      self.key_dim > 1 or self.query_key_norm != "layernorm",
      named(_PATH, "key_dim"),
      self.key_dim,
      "must be at least 2 with query_key_norm = 'layernorm', which makes a "
      "single number 0",
    )
    require(
      math.isqrt(self.expansion) ** 2 == self.expansion,
      named(_PATH, "expansion"),
      self.expansion,
      "must be a perfect square",
    )
    require(
      self.value_dim % self.num_cores == 0,
      named(_PATH, "value_dim"),
      self.value_dim,
      f"must be divisible by num_cores = {self.num_cores}",
    )
    require(
      self.num_heads % self.heads_per_query == 0
      or self.imported.spare_queries > 0
      or self.kind == "ultramem_v2",
      named(_PATH, "heads_per_query"),
      self.heads_per_query,
      f"must divide num_heads = {self.num_heads}; 1 always does",
    )
    require(
      self.score == "tucker" or self.num_cores == 1,
      named(_PATH, "num_cores"),
      self.num_cores,
      "must be 1 with score = 'sum', which has no core",
    )
    require(
      self.projections == 1 or self.value_projection,
      named(_PATH, "value_projection"),
      self.value_projection,
      f"must be True with expansion = {self.expansion}, unless "
      "shared_projection: each part of the expansion has its own projection",
    )
    require(
      self.init == "official"
      or (self.query_key_norm != "none" and not self.softmax),
      named(_PATH, "init"),
      self.init,
      "'paper' calibrates the query norm for scores without softmax: set "
      "query_key_norm and no softmax, or choose 'official'",
    )

  def require_grid(self) -> None:
    """Raises ConfigError if the grid of cells is empty, or too large."""
    reach = " * sqrt(share_ratio * ring_layers)" * (self.kind == "ultramem_v2")
    side = f"sqrt(expansion) * num_keys{reach} = {self.grid_side}"
    require(
      1 <= self.grid_side <= MAX_GRID_SIDE,
      named(_PATH, "num_keys"),
      self.num_keys,
      f"{side} must be from 1 to {MAX_GRID_SIDE}, so that a cell fits in int32",
    )
    # A ring adds a memory's first row before it goes around its end.
    ring = 2 if self.kind == "ultramem_v2" else 1
    count = max(self.projections, ring) * self.stored_rows
    require(
      count <= 2**31,
      named(_PATH, "num_keys"),
      self.num_keys,
      f"makes {count} places of rows, which must be at most 2^31, so that "
      "one fits in int32",
    )
    require(
      self.top_m <= self.grid_side,
      named(_PATH, "top_m"),
      self.top_m,
      f"must be at most the keys of a side, {side}",
    )


# The memory settings of a model without memory.
NO_MEMORY = MemoryConfig(
  kind="none", num_keys=1, key_dim=2, value_dim=1, top_m=1, num_cores=1
)
