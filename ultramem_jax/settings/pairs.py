"""Settings that give numbers to several things: "NAME=NUMBER,NAME=NUMBER"."""

import math

from ultramem_jax.settings.checks import require, require_regex


def parse_pairs(
  field: str, text: str, form: str, example: str
) -> tuple[tuple[str, float], ...]:
  """Parses pairs of a setting.

  Args:
    field: the name of the setting.
    text: its value; "" has no pairs.
    form, example: what an error says is allowed, such as "NAME=NUMBER".
  Returns:
    (name, number) pairs; the numbers are finite, and at least 0.
  Raises:
    ConfigError: something else.
  """
  pairs = []
  for part in filter(None, text.split(",")):
    name, _, digits = part.rpartition("=")
    require(
      bool(name and digits),
      field,
      text,
      f"must be {form}, joined by ',', such as {example!r}",
    )
    try:
      number = float(digits)
    except ValueError:
      number = math.nan
    require(
      math.isfinite(number) and number >= 0,
      field,
      text,
      f"{digits!r} must be a number of at least 0",
    )
    pairs.append((name, number))
  return tuple(pairs)


def parse_multipliers(field: str, text: str) -> tuple[tuple[str, float], ...]:
  """Parses factors on learning rates, by patterns of parameters' paths.

  Args, Returns and Raises: as for `parse_pairs`; names are regular expressions,
  and factors at most 1000.
  """
  pairs = parse_pairs(field, text, "PATTERN=FACTOR", "embed=0.1,memory=5")
  for pattern, factor in pairs:
    require_regex(field, pattern)
    require(factor <= 1000, field, text, "must have factors of at most 1000")
  return pairs


def parse_shares(field: str, text: str) -> tuple[tuple[str, float], ...]:
  """Parses shares of what a run reads, by path.

  Args, Returns and Raises: as for `parse_pairs`; shares are above 0, and leave
  some for others; no path stands twice.
  """
  pairs = parse_pairs(field, text, "PATH=SHARE", "facts.jsonl=0.3")
  paths = [path for path, _ in pairs]
  require(
    len(set(paths)) == len(paths), field, text, "must name each path once"
  )
  require(
    all(share > 0 for _, share in pairs) and sum(s for _, s in pairs) < 1,
    field,
    text,
    "must have shares above 0 that add up to less than 1; data.source has the "
    "rest",
  )
  return pairs
