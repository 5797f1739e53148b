"""What a run does about steps that would harm it, `config.guard`."""

import dataclasses

from ultramem_jax.settings.checks import (
  require,
  require_at_least,
  require_types,
)


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """When a step is skipped, and what too many of these lead to.

  Every field is explained in `configs/default.py`.
  """

  max_skips: int = 10
  spike: float = 0.0
  rollbacks: int = 0

  def __post_init__(self):
    path = "guard"
    require_types(path, self)
    require_at_least(path, self, 1, "max_skips")
    require_at_least(path, self, 0, "rollbacks")
    require(
      self.spike == 0 or self.spike > 1,
      f"{path}.spike",
      self.spike,
      "must be 0 (no step is a spike) or above 1: a gradient norm above this "
      "multiple of its mean is a spike",
    )
