"""How rotary wavelengths are stretched, for texts longer than in training."""

import dataclasses
import math

from ultramem_jax.settings.checks import (
  require,
  require_at_least,
  require_choice,
  require_positive,
  require_types,
)

_PATH = "model.rope_scaling"


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """The settings `config.model.rope_scaling`.

  Every field is explained in `configs/default.py`; the maths is in
  `ops/rotary.py`.
  """

  kind: str = "none"
  factor: float = 1.0
  original_length: int = 8192
  low_rotations: float = 1.0
  high_rotations: float = 4.0
  truncate: bool = True
  attention_factor: float = 0.0

  @property
  def amplitude(self) -> float:
    """What sines and cosines are multiplied by."""
    if self.attention_factor or self.kind != "yarn":
      return self.attention_factor or 1.0
    return 0.1 * math.log(max(self.factor, 1.0)) + 1.0

  def __post_init__(self):
    require_types(_PATH, self)
    require_choice(_PATH, self, "kind", "none", "linear", "llama3", "yarn")
    require_at_least(_PATH, self, 1, "original_length")
    require_at_least(_PATH, self, 0, "attention_factor")
    require_positive(_PATH, self, "factor", "low_rotations", "high_rotations")
    require(
      self.kind != "none" or self.factor == 1,
      f"{_PATH}.factor",
      self.factor,
      "must be 1 with kind = 'none', which stretches nothing",
    )
    require(
      self.low_rotations < self.high_rotations,
      f"{_PATH}.high_rotations",
      self.high_rotations,
      f"must be above low_rotations = {self.low_rotations}",
    )
