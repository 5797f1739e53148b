"""Formulas of the documentation as MathML, which browsers draw themselves.

MkDocs calls `on_page_content` for each page. `pymdownx.arithmatex` has marked
the LaTeX of `$...$` and `$$...$$` by then.
"""

import html
import re

from latex2mathml import converter

FORMULA = re.compile(
  r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL
)


def on_page_content(page_html: str, **_) -> str:
  """Returns the page's HTML with MathML in place of LaTeX."""
  return FORMULA.sub(_mathml, page_html)


def _mathml(match: re.Match) -> str:
  display = "block" if match[1] == "div" else "inline"
  return converter.convert(html.unescape(match[2]).strip(), display=display)
