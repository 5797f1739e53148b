"""Factors on learning rates, by patterns of parameters."""

import re

from ultramem_jax.settings.checks import require, require_regex


def parse_multipliers(field: str, text: str) -> tuple[tuple[str, float], ...]:
  """Parses "PATTERN=FACTOR,PATTERN=FACTOR" of a setting.

  Args:
    field: the name of the setting.
    text: its value; "" has no patterns.
  Returns:
    (regular expression, factor) pairs.
  Raises:
    ConfigError: something else.
  """
  pairs = []
  for part in filter(None, text.split(",")):
    pattern, _, factor = part.rpartition("=")
    require(
      bool(pattern and re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", factor)),
      field,
      text,
      "must be PATTERN=FACTOR, joined by ',', such as 'embed=0.1,memory=5'",
    )
    require_regex(field, pattern)
    require(
      float(factor) <= 1000, field, text, "must have factors of at most 1000"
    )
    pairs.append((pattern, float(factor)))
  return tuple(pairs)
