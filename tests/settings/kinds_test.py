"""Kinds of memory: complete defaults, and what they fix."""

import dataclasses

import pytest

from ultramem_jax.settings import kinds
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.memory import MemoryConfig

MEMORY = dict(num_keys=64, key_dim=16, value_dim=32, top_m=8)


@pytest.mark.parametrize("kind", kinds.DEFAULTS)
def test_every_kind_has_complete_defaults(kind):
  """Four sizes make a memory, whose own values hold when it is replaced."""
  memory = MemoryConfig(kind=kind, **MEMORY)
  for field, value in kinds.DEFAULTS[kind].items():
    assert getattr(memory, field) == value, field
  assert None not in dataclasses.astuple(memory)
  # None for the kind's own value, and the value itself, are one config.
  stated = MemoryConfig(kind=kind, **MEMORY, **kinds.DEFAULTS[kind])
  assert stated == memory and hash(stated) == hash(memory)
  assert dataclasses.replace(memory, num_heads=4).num_heads == 4


def test_kinds_differ_only_in_fields_of_their_own():
  own = {f.name for f in dataclasses.fields(MemoryConfig) if f.default is None}
  for kind, values in kinds.DEFAULTS.items():
    assert set(values) == own, kind
    assert set(kinds.FIXED[kind]) <= own
  fields = {f.name for f in dataclasses.fields(MemoryConfig)}
  assert set(kinds.READ_BY) <= fields


@pytest.mark.parametrize(
  ("kind", "field"),
  [(kind, field) for kind in kinds.FIXED for field in kinds.FIXED[kind]],
)
def test_what_a_kind_fixes_is_named(kind, field):
  fixed = kinds.DEFAULTS[kind][field]
  other = {bool: lambda: not fixed, int: lambda: fixed + 1, str: lambda: "x"}[
    type(fixed)
  ]()
  with pytest.raises(ConfigError) as error:
    MemoryConfig(kind=kind, **MEMORY, **{field: other})
  assert str(error.value) == (
    f"model.memory.{field} = {other!r}: must be {fixed!r} with kind = {kind!r}"
  )
