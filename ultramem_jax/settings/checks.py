"""Rules that settings keep; breaking one raises ConfigError.

The functions take `path`, the section that an error names before the field:
"optim" gives "optim.eps", and "" gives "eps".
"""

import dataclasses
import math
import re
from typing import Any

import numpy as np

from ultramem_jax.settings.errors import ConfigError


def named(path: str, field: str) -> str:
  """Returns the name of a field of the section at path."""
  return f"{path}.{field}" if path else field


def require(ok: bool, field: str, value: Any, allowed: str) -> None:
  """Raises ConfigError "field = value: allowed" unless ok."""
  if not ok:
    raise ConfigError(f"{_cut(field)} = {_cut(repr(value))}: {allowed}")


# A damaged file may hold a name or a value of any length.
MAX_QUOTED = 500


def _cut(text: str) -> str:
  return text if len(text) <= MAX_QUOTED else f"{text[:MAX_QUOTED]}..."


# The numbers that float32 holds in full precision, but for 0 and the sign.
_FLOAT32 = np.finfo(np.float32)
LEAST_FLOAT, MOST_FLOAT = float(_FLOAT32.tiny), float(_FLOAT32.max)
# Integers must fit in int32, and seeds in uint32.
INT_END = 2**31
SEED_END = 2**32
# What is all zero is multiplied by up to its inverse root in a norm's gradient.
MIN_NORM_EPS = 1e-12


def require_types(path: str, config: Any) -> None:
  """Requires each field of dataclass config to have its type and fit into it.

  Programs compute with float32 and int32, to which other numbers would be
  rounded, or cut, without a word. A float field takes an int; an int field
  takes no bool; a str is text (`require_text`); a field "seed" is checked by
  `require_seed`. Call it before the other rules, which compare values.
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
    if field.type is float:
      require_float(named(path, field.name), value)
    if field.type is str:
      require_text(named(path, field.name), value)
    if field.type is int and field.name != "seed":
      require(
        -INT_END <= value < INT_END,
        named(path, field.name),
        value,
        "must be less than 2^31 in size",
      )


def require_float(name: str, value: float) -> None:
  """Requires a number to be finite, and 0 or in the range of float32."""
  is_whole = type(value) is int  # which may be too large to be a float
  require(is_whole or math.isfinite(value), name, value, "must be finite")
  require(
    value == 0 or LEAST_FLOAT <= abs(value) <= MOST_FLOAT,
    name,
    value,
    f"must be 0, or from {LEAST_FLOAT:.2g} to {MOST_FLOAT:.2g} in size: "
    "programs compute in float32",
  )


def require_seed(name: str, seed: int) -> None:
  """Requires a seed that a PRNG key takes whole."""
  require(
    0 <= seed < SEED_END,
    name,
    seed,
    "must be at least 0 and less than 2^32, as a random key uses 32 bits",
  )


def require_text(field: str, value: str) -> None:
  """Requires a string to be text, as Python's of undecodable bytes is not."""
  try:
    value.encode()
  except UnicodeEncodeError:
    reason = "must be text; some of its bytes are not UTF-8"
    require(False, field, value, reason)


def require_at_least(path: str, config: Any, low: float, *fields: str) -> None:
  """Requires every named field of config to be at least low."""
  for field in fields:
    value = getattr(config, field)
    require(value >= low, named(path, field), value, f"must be at least {low}")


def require_at_most(path: str, config: Any, high: float, *fields: str) -> None:
  """Requires every named field of config to be at most high."""
  for field in fields:
    value = getattr(config, field)
    require(value <= high, named(path, field), value, f"must be at most {high}")


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


def require_norm_eps(path: str, config: Any) -> None:
  """Requires norm_eps of config to keep a norm's gradient in float32."""
  require(
    MIN_NORM_EPS <= config.norm_eps <= 1,
    named(path, "norm_eps"),
    config.norm_eps,
    f"must lie in [{MIN_NORM_EPS}, 1]",
  )


def require_regex(name: str, pattern: str) -> None:
  """Requires a regular expression that Python can read."""
  try:
    re.compile(pattern)
  except (re.error, RecursionError, OverflowError) as error:
    require(False, name, pattern, f"is not a regular expression: {error}")


def require_pattern(path: str, config: Any, *fields: str) -> None:
  """Requires every named field of config to be a regular expression."""
  for field in fields:
    require_regex(named(path, field), getattr(config, field))
