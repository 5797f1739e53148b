"""Places of memories in a transformer, as a config writes them."""

import pytest

from configs import tiny
from tests.settings import refusals
from ultramem_jax.settings import config
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.spans import Span, parse_blocks, parse_spans


@refusals.cases(
  [
    ({"model.memory.spans": spans}, "model.memory.spans", allowed)
    for spans, allowed in (
      ("1", "'i:j' parts"),
      ("1:2/", "got ''"),
      ("1:2,3:4", "'i:j'"),
      ("a:b", "got 'a:b'"),
      ("-1:2", "got '-1:2'"),
      ("1:2:3", "'1:2:3'"),
      ("0:1", "1 <= i <= j"),
      ("2:1", "1 <= i <= j"),
      ("3:5", "num_layers = 4"),
      ("1:2/1:3", "same block"),
    )
  ]
)
def test_bad_spans_are_named(changes, field, allowed):
  refusals.assert_refused(changes, field, allowed)


def test_numbers_too_long_for_python_are_refused():
  digits = 5000 * "9"
  with pytest.raises(ConfigError, match="'i:j' parts"):
    parse_spans(f"1:{digits}", 4)
  with pytest.raises(ConfigError, match="each from 1 to"):
    parse_blocks("blocks", digits, 4)


def test_spans():
  assert parse_spans("1:2/2:3", 4) == (Span(0, 0, 1), Span(1, 1, 2))
  assert parse_spans("3:4/1:3", 4) == (Span(0, 2, 3), Span(1, 0, 2))
  assert parse_spans("4:4", 4) == (Span(0, 3, 3),)
  dense = tiny.get_config()
  dense.model.memory.update(kind="none", spans="")
  assert config.parse(dense).model.spans == ()


def test_full_is_every_block():
  assert parse_spans("full", 2) == (Span(0, 0, 0), Span(1, 1, 1))
  assert parse_blocks("model.mlp_conv_blocks", "full", 3) == (0, 1, 2)
  assert parse_blocks("model.mlp_conv_blocks", "3/1", 3) == (2, 0)
