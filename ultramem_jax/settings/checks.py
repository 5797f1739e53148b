"""Rules of settings, and the error that a broken one raises."""

import dataclasses
import math
from typing import Any

from ultramem_jax.settings.errors import ConfigError


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
  """Raises ConfigError "field = value: allowed" unless ok."""
  if not ok:
    raise ConfigError(f"{field} = {value!r}: {allowed}")


def require_types(path: str, config: Any) -> None:
  """Requires each field of dataclass config to be of its type, and finite.

  An int will do for a float, but no bool for an int. To be called before the
  other rules, which compare values.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    allowed = (float, int) if field.type is float else (field.type,)
    name = f"{path}.{field.name}" if path else field.name
    require(
      type(value) in allowed,
      name,
      value,
      f"must be of type {field.type.__name__}",
    )
    require(
      field.type is not float or math.isfinite(value),
      name,
      value,
      "must be finite",
    )


def require_at_least(path: str, config: Any, low: float, *fields: str) -> None:
  """Requires every named field of config to be at least low."""
  for field in fields:
    value = getattr(config, field)
    require(value >= low, f"{path}.{field}", value, f"must be at least {low}")


def require_positive(path: str, config: Any, *fields: str) -> None:
  """Requires every named field of config to be above 0."""
  for field in fields:
    value = getattr(config, field)
    require(value > 0, f"{path}.{field}", value, "must be positive")


def require_choice(path: str, config: Any, field: str, *choices: str) -> None:
  """Requires the named field of config to be one of choices."""
  value = getattr(config, field)
  require(
    value in choices,
    f"{path}.{field}",
    value,
    f"must be one of {', '.join(choices)}",
  )


def require_fraction(path: str, config: Any, *fields: str) -> None:
  """Requires every named field of config to lie in [0, 1]."""
  for field in fields:
    value = getattr(config, field)
    require(0 <= value <= 1, f"{path}.{field}", value, "must lie in [0, 1]")
