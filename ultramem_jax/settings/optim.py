"""Settings of the optimizer: `config.optim`."""

import dataclasses

from ultramem_jax.settings.checks import (
  require,
  require_at_least,
  require_at_most,
  require_choice,
  require_fraction,
  require_pattern,
  require_positive,
  require_types,
)
from ultramem_jax.settings.pairs import parse_multipliers

# With less, a gradient whose square float32 rounds to 0 would give an update
# far larger than the learning rate: such a gradient is up to about 1e-17.
MIN_EPS = 1e-16
# 1 - beta has two digits in float32; it divides the moments at the first step.
MAX_BETA = 0.999999


@dataclasses.dataclass(frozen=True)
class OptimConfig:
  """AdamW, its learning rate over the steps, and its parameter groups."""

  learning_rate: float
  warmup_fraction: float
  init_fraction: float
  final_fraction: float
  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  decay_norms: bool
  clip_norm: float
  value_lr_multiplier: float
  value_lr_horizon: float
  table_update: str
  table_moments: str
  table_second_moment: str
  z_loss: float
  trainable: str = "all"
  rate_multipliers: str = ""
  frozen_dtype: str = "float32"
  table_rule: str = "adamw"
  table_rows: str = "all"
  table_top_t: int = 500
  table_counts: str = ""
  table_max_share: float = 1.0
  distillation: float = 0.0

  def __post_init__(self):
    path = "optim"
    require_types(path, self)
    require_choice(path, self, "table_update", "dense", "sparse", "auto")
    require_choice(path, self, "frozen_dtype", "float32", "bfloat16")
    require_choice(path, self, "table_moments", "float32", "bfloat16")
    require_choice(path, self, "table_second_moment", "element", "row")
    self._require_table_rule()
    self._require_table_rows()
    require_positive(path, self, "learning_rate")
    # AdamW moves a parameter by about the rate in a step.
    require_at_most(path, self, 1000, "learning_rate", "weight_decay")
    require(
      MIN_EPS <= self.eps <= 1,
      "optim.eps",
      self.eps,
      f"must lie in [{MIN_EPS}, 1]: with less, an update has no bound where "
      "float32 rounds the square of a gradient to 0",
    )
    require(
      0 < self.value_lr_horizon <= 1,
      "optim.value_lr_horizon",
      self.value_lr_horizon,
      "must lie in (0, 1]: a share of the steps",
    )
    require_fraction(
      path,
      self,
      "warmup_fraction",
      "init_fraction",
      "final_fraction",
      "table_max_share",
      "distillation",
    )
    for field in ("beta1", "beta2"):
      value = getattr(self, field)
      require(
        0 <= value <= MAX_BETA,
        f"{path}.{field}",
        value,
        f"must lie in [0, {MAX_BETA}]: float32 does not tell more from 1",
      )
    require_pattern(path, self, "trainable")
    require(
      self.trainable != "",
      "optim.trainable",
      self.trainable,
      "must say what is trained: a regular expression, or 'all'",
    )
    _ = self.multipliers  # raises on a bad one
    require_at_least(
      path,
      self,
      0,
      "weight_decay",
      "clip_norm",
      "value_lr_multiplier",
      "z_loss",
    )

  def _require_table_rule(self):
    require_choice("optim", self, "table_rule", "adamw", "sgd")
    for field, only in (
      ("table_moments", "float32"),
      ("table_second_moment", "element"),
    ):
      value = getattr(self, field)
      require(
        self.table_rule == "adamw" or value == only,
        f"optim.{field}",
        value,
        f"must be {only} with optim.table_rule = sgd, which has no moments",
      )

  def _require_table_rows(self):
    require_choice("optim", self, "table_rows", "all", "tfidf", "kl")
    require_at_least("optim", self, 1, "table_top_t")
    if not self.chooses_rows:
      require(
        self.table_max_share == 1,
        "optim.table_max_share",
        self.table_max_share,
        "must be 1 with optim.table_rows = all, which needs no counts",
      )
      require(
        self.table_top_t == type(self).table_top_t,
        "optim.table_top_t",
        self.table_top_t,
        "is not read with optim.table_rows = all: choose rows by tfidf or kl",
      )
      require(
        not self.table_counts,
        "optim.table_counts",
        self.table_counts,
        "is not read with optim.table_rows = all: choose rows by tfidf or kl",
      )
      return
    require(
      self.table_update != "dense",
      "optim.table_update",
      self.table_update,
      f"must be sparse or auto with optim.table_rows = {self.table_rows}, "
      "which updates some rows only",
    )
    require(
      bool(self.table_counts),
      "optim.table_counts",
      self.table_counts,
      "must name a file of row counts, or a workdir that has one, which "
      f"optim.table_rows = {self.table_rows} needs: python -m ultramem_jax "
      "count --workdir=DIR makes them",
    )

  @property
  def moments(self) -> str:
    """The dtype of the moments of tables; "none": their rule has none."""
    return "none" if self.table_rule == "sgd" else self.table_moments

  @property
  def chooses_rows(self) -> bool:
    """Whether only some of the rows that a step reads are updated."""
    return self.table_rows != "all"

  @property
  def multipliers(self) -> tuple[tuple[str, float], ...]:
    """Patterns of paths of parameters, and the factors on their rates."""
    return parse_multipliers("optim.rate_multipliers", self.rate_multipliers)
