"""Places in a transformer: the spans of memories, lists of blocks."""

import dataclasses

from ultramem_jax.settings.checks import require


@dataclasses.dataclass(frozen=True)
class Span:
  """Memory `index` reads in block `start` and is added after block `end`.

  Blocks are counted from 0.
  """

  index: int
  start: int
  end: int

  @property
  def name(self) -> str:
    """The name of the memory's parameters."""
    return f"memory_{self.index}"


def _is_number(text: str) -> bool:
  return text.isdecimal() and len(text) <= 10  # no block has a longer one


def parse_spans(spans: str, num_layers: int) -> tuple[Span, ...]:
  """Reads "i:j/i:j/..." (blocks counted from 1, as in the paper).

  Args:
    spans: where each memory reads (i) and after which block it is added (j).
      Spans may overlap or touch. "full" is a memory i:i in every block.
    num_layers: L, blocks of the transformer.
  Returns:
    One Span per memory, blocks counted from 0, in the order written.
  Raises:
    ConfigError: the text is not of that form, a block is out of range, j < i,
      or an i is repeated.
  """
  field = "model.memory.spans"
  if spans == "full":
    return tuple(Span(layer, layer, layer) for layer in range(num_layers))
  parsed = []
  for index, text in enumerate(spans.split("/")):
    start, _, end = text.partition(":")
    require(
      _is_number(start) and _is_number(end),
      field,
      spans,
      f"must be 'i:j' parts joined by '/', such as '1:2/3:4'; got {text!r}",
    )
    start, end = int(start), int(end)
    require(
      1 <= start <= end <= num_layers,
      field,
      spans,
      f"span {text!r} must satisfy 1 <= i <= j <= model.num_layers = "
      f"{num_layers}",
    )
    parsed.append(Span(index, start - 1, end - 1))
  starts = [span.start for span in parsed]
  require(
    len(set(starts)) == len(starts),
    field,
    spans,
    "no two memories may read in the same block",
  )
  return tuple(parsed)


def parse_blocks(field: str, blocks: str, num_layers: int) -> tuple[int, ...]:
  """Reads "i/j/..." (blocks counted from 1).

  Args:
    field: the field that an error names.
    blocks: the numbers of different blocks; "full" is every block.
    num_layers: L, blocks of the transformer.
  Returns:
    The blocks, counted from 0, in the order written.
  Raises:
    ConfigError: the text is not of that form, or a block is out of range or
      repeated.
  """
  if blocks == "full":
    return tuple(range(num_layers))
  parts = blocks.split("/")
  require(
    all(_is_number(part) and 1 <= int(part) <= num_layers for part in parts)
    and len(set(map(int, parts))) == len(parts),
    field,
    blocks,
    "must be 'full' or different blocks joined by '/', such as '1/3', each "
    f"from 1 to model.num_layers = {num_layers}",
  )
  return tuple(int(part) - 1 for part in parts)
