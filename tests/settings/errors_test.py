"""What a command shows of an error."""

import pytest

from ultramem_jax.settings.errors import first_line


@pytest.mark.parametrize(
  ("error", "line"),
  [
    (ValueError("one\ntwo"), "one"),
    (ValueError("\n one"), "one"),
    (MemoryError(), "MemoryError"),
    (ValueError("x" * 300), "x" * 200),
  ],
)
def test_the_first_line_of_an_error(error, line):
  assert first_line(error) == line
