"""The settings of LoRA, `config.model.lora`."""

import dataclasses
import re

from ultramem_jax.settings.checks import (
  require_at_least,
  require_pattern,
  require_positive,
  require_types,
)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank changes of linear maps (LoRA, arXiv 2106.09685).

  Every field is explained in `configs/default.py`.
  """

  rank: int = 0
  alpha: float = 16.0
  targets: str = "attention/(query|value)"

  @property
  def scale(self) -> float:
    """What the product of the two matrices is multiplied by."""
    return self.alpha / self.rank

  def adapts(self, path: str) -> bool:
    """Returns whether the linear map at path, joined by "/", has a LoRA."""
    return self.rank > 0 and bool(re.search(self.targets, path))

  def __post_init__(self):
    path = "model.lora"
    require_types(path, self)
    require_at_least(path, self, 0, "rank")
    require_positive(path, self, "alpha")
    require_pattern(path, self, "targets")
