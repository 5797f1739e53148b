"""Places of memories in a transformer, as a config writes them."""

from configs import tiny
from ultramem_jax.settings import config
from ultramem_jax.settings.spans import Span, parse_blocks, parse_spans


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
