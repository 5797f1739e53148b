"""Tables, and pages of the documentation with blocks that benchmarks write.

A block stands between <!-- NAME --> and <!-- /NAME -->; all else is written by
hand.
"""

import pathlib
import re
from collections.abc import Mapping, Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns a table in Markdown; "" without rows."""
  if not rows:
    return ""
  lines = [header, ["---"] * len(header), *rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def fill(page: str, texts: Mapping[str, str]) -> str:
  """Returns a page with these texts in its blocks, by name.

  Raises:
    ValueError: the page lacks a block.
  """
  for name, text in texts.items():
    pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
    page, count = re.subn(
      pattern,
      lambda match, text=text: f"{match[1]}\n{text}\n\n{match[2]}",
      page,
      flags=re.DOTALL,
    )
    if count != 1:
      raise ValueError(f"the page has {count} blocks <!-- {name} -->, not one")
  return page


def write(path: pathlib.Path, texts: Mapping[str, str]) -> None:
  """Writes the blocks of a page anew, if there is such a page."""
  if path.exists():
    path.write_text(fill(path.read_text(), texts))
