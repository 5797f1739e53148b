"""Rules that settings keep; breaking one raises ConfigError.

The functions take `path`, the section that an error names before the field:
"optim" gives "optim.eps", and "" gives "eps".
"""

import dataclasses
import math
from typing import Any

from ultramem_jax.settings.errors import ConfigError


def named(path: str, field: str) -> str:
  """Returns the name of a field of the section at path."""
  return f"{path}.{field}" if path else field


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
  """Raises ConfigError "field = value: allowed" unless ok."""
  if not ok:
    raise ConfigError(f"{field} = {value!r}: {allowed}")


def require_types(path: str, config: Any) -> None:
  """Requires each field of dataclass config to have its type and be finite.

  A float field takes an int; an int field takes no bool. Call it before the
  other rules, which compare values.
  """
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    allowed = (float, int) if field.type is float else (field.type,)
    require(
      type(value) in allowed,
      named(path, field.name),
      value,
      f"must be of type {getattr(field.type, '__name__', field.type)}",
    )
    require(
      field.type is not float or math.isfinite(value),
      named(path, field.name),
      value,
      "must be finite",
    )


def require_at_least(path: str, config: Any, low: float, *fields: str) -> None:
  """Requires every named field of config to be at least low."""
  for field in fields:
    value = getattr(config, field)
    require(value >= low, named(path, field), value, f"must be at least {low}")


def require_positive(path: str, config: Any, *fields: str) -> None:
  """Requires every named field of config to be above 0."""
  for field in fields:
    value = getattr(config, field)
    require(value > 0, named(path, field), value, "must be positive")


def require_choice(path: str, config: Any, field: str, *choices: str) -> None:
  """Requires the named field of config to be one of choices."""
  value = getattr(config, field)
  require(
    value in choices,
    named(path, field),
    value,
    f"must be one of {', '.join(choices)}",
  )


def require_fraction(path: str, config: Any, *fields: str) -> None:
  """Requires every named field of config to lie in [0, 1]."""
  for field in fields:
    value = getattr(config, field)
    require(0 <= value <= 1, named(path, field), value, "must lie in [0, 1]")
