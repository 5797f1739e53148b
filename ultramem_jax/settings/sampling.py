"""How tokens are drawn when a model generates."""

import dataclasses
from typing import Any

from ultramem_jax.settings.checks import (
  named,
  require,
  require_at_least,
  require_at_most,
  require_types,
)


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How many tokens to generate, and how to draw each one.

  num_tokens: the number of new tokens, at most.
  temperature: divides the logits; 0 always takes the likeliest token.
  top_k: keeps the k likeliest tokens; 0 keeps all.
  top_p: of these, keeps the fewest likeliest tokens whose probabilities sum to
    at least p, in (0, 1].
  """

  num_tokens: int
  temperature: float = 1.0
  top_k: int = 0
  top_p: float = 1.0

  def __post_init__(self):
    require_types("", self)
    require_sampling("", self)


def require_sampling(path: str, values: Any) -> None:
  """Requires the fields of `Sampling`, held by values, to be in range.

  Args:
    path: what an error puts before the name of a field, such as "sample"; ""
      for the name as it is.
    values: has the fields of `Sampling` as attributes.
  Raises:
    ConfigError: a field is out of range.
  """
  require_at_least(path, values, 0, "num_tokens", "temperature", "top_k")
  # The cache has room for all of them before the first is drawn.
  require_at_most(path, values, 10**6, "num_tokens")
  require(
    0 < values.top_p <= 1,
    named(path, "top_p"),
    values.top_p,
    "must lie in (0, 1]; 1 keeps every token",
  )
