"""Shares of what a run reads, by path."""

import re

from ultramem_jax.settings.checks import require


def parse_shares(field: str, text: str) -> tuple[tuple[str, float], ...]:
  """Parses "PATH=SHARE,PATH=SHARE" of a setting.

  Args:
    field: the name of the setting.
    text: its value; "" has no paths.
  Returns:
    (path, share) pairs; the shares are above 0, and leave some for others.
  Raises:
    ConfigError: something else.
  """
  pairs = []
  for part in filter(None, text.split(",")):
    path, _, share = part.rpartition("=")
    require(
      bool(path and re.fullmatch(r"[0-9.]+(e-?[0-9]+)?", share)),
      field,
      text,
      "must be PATH=SHARE, joined by ',', such as 'facts.jsonl=0.3'",
    )
    pairs.append((path, _number(field, text, share)))
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
  return tuple(pairs)


def _number(field: str, text: str, digits: str) -> float:
  try:
    return float(digits)
  except ValueError:
    require(False, field, text, f"{digits!r} is no number")
    raise
