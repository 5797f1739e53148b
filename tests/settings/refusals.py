"""What a config is refused for, and what the error says."""

import pytest

from configs import tiny
from ultramem_jax.settings import config, kinds
from ultramem_jax.settings.errors import ConfigError


def cases(bad):
  """Runs a test of `assert_refused` with each tuple of its arguments."""
  return pytest.mark.parametrize(
    ("changes", "field", "allowed"),
    bad,
    ids=[
      ",".join(f"{k}={v}" for k, v in changes.items()) for changes, *_ in bad
    ],
  )


def assert_refused(changes, field, allowed):
  """Checks the error of configs/tiny.py with changes.

  Args:
    changes: values by the names of fields, which may be unknown ones.
    field: what the error must name first, with its value.
    allowed: a part of what it then says is allowed.
  """
  c = tiny.get_config().to_dict()
  for name, value in changes.items():
    group, last = section(c, name)
    group[last] = value
  group, last = section(c, field)
  value = group[last]
  if value is None and field.startswith("model.memory."):
    value = kinds.DEFAULTS[group["kind"]][last]
  with pytest.raises(ConfigError) as error:
    config.parse(c)
  message = str(error.value)
  assert message.startswith(f"{field} = {value!r}: ")
  assert allowed in message.split(": ", 1)[1]


def section(c, name):
  """Returns the nested dict that holds a field, and its name there."""
  *groups, last = name.split(".")
  for group in groups:
    c = c[group]
  return c, last
