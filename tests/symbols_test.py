"""Letters of array names: those of docs/symbols.md, and the right ones."""

import ast
import re

from ultramem_jax import testing

LEGEND = set(
  re.findall(
    r"^\| ([A-Z]) \|", (testing.ROOT / "docs/symbols.md").read_text(), re.M
  )
)
# A name of words in small letters, then a letter for each axis.
ARRAY = re.compile(r"_?[a-z][a-z0-9_]*_((?=[a-z0-9]*[A-Z])[A-Za-z0-9]+)")


def files():
  for path in sorted((testing.ROOT / "ultramem_jax").rglob("*.py")):
    yield path.relative_to(testing.ROOT), ast.parse(path.read_text())


def array_letters(tree):
  """Yields (name, letters) of every array that a module names."""
  for node in ast.walk(tree):
    for field in ("id", "arg", "attr", "name"):
      name = getattr(node, field, None)
      found = ARRAY.fullmatch(name) if isinstance(name, str) else None
      if found:
        yield name, found[1]


def docstrings(tree):
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
      yield ast.get_docstring(node) or ""


def test_array_names_end_with_letters_of_the_legend():
  used = set()
  for path, tree in files():
    for name, letters in array_letters(tree):
      axes = {x.upper() for x in letters if x.isalpha()}
      assert axes <= LEGEND, f"{path}: {name}"
      used |= axes
  assert used == LEGEND


def test_docstrings_give_arrays_the_shapes_of_their_names():
  """`x_BTD: [B, T, D]`; and a shape [B, T, ...] has letters of the legend."""
  count = 0
  for path, tree in files():
    for text in docstrings(tree):
      for shape in re.findall(r"\[([A-Z](?:, [A-Za-z])*)\]", text):
        assert set(shape.split(", ")) <= LEGEND | {x.lower() for x in LEGEND}, (
          f"{path}: [{shape}]"
        )
      for name, shape in re.findall(r"(\w+): \[([\w, ]+)\]", text):
        found = ARRAY.fullmatch(name)
        if found:
          assert shape.replace(", ", "") == found[1], f"{path}: {name}"
          count += 1
  assert count > 50
