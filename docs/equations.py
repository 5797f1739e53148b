"""Equations of docstrings as code blocks.

A docstring sets an equation on lines of its own, two spaces further in than
its text. Markdown wants four.
"""

import griffe


class Equations(griffe.Extension):
  """Indents the equations of every docstring as Markdown wants them."""

  def on_object(self, *, obj: griffe.Object, **_) -> None:
    if obj.docstring:
      obj.docstring.value = indent_equations(obj.docstring.value)


def indent_equations(text: str) -> str:
  """Returns text with paragraphs that are indented indented by two more."""
  return "\n\n".join(
    "\n".join(f"  {line}" for line in paragraph.split("\n"))
    if all(line.startswith("  ") for line in paragraph.split("\n"))
    else paragraph
    for paragraph in text.split("\n\n")
  )
