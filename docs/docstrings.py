"""Docstrings of the package as the site's Markdown wants them.

A docstring sets an equation on lines of its own, two spaces further in than
its text; a code block of Markdown is four spaces in. And it may write a short
section on the line of its name, "Returns: [B, T] int32."
"""

import re

import griffe


class Docstrings(griffe.Extension):
  """Rewrites every docstring by `rewrite`."""

  def on_object(self, *, obj: griffe.Object, **_) -> None:
    if obj.docstring:
      obj.docstring.value = rewrite(obj.docstring.value)


def rewrite(text: str) -> str:
  """Returns a docstring with equations four spaces in, and whole sections."""
  text = re.sub(r"(?m)^(Args|Returns|Raises): (.+)$", r"\1:\n  \2", text)
  return "\n\n".join(
    "\n".join(f"  {line}" for line in paragraph.split("\n"))
    if all(line.startswith("  ") for line in paragraph.split("\n"))
    else paragraph
    for paragraph in text.split("\n\n")
  )
