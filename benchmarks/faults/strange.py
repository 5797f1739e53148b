"""Values and files that are almost right, as `hypothesis` draws them."""

import copy
import functools
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

STRANGE_TEXT = (
  "", "x", "..", "../../etc/passwd", "/etc/passwd", "nan", "1e400", "0", "-1",
  "\0", "\ud800", "a\nb", "9" * 400, "none", "float32", "é" * 50,
)  # fmt: skip

numbers = st.one_of(
  st.integers(-3, 70),
  st.sampled_from([2**31 - 1, 2**31, 2**63, -(2**70), 10**400]),
  st.floats(),
)
leaves = st.one_of(
  st.none(), st.booleans(), numbers, st.sampled_from(STRANGE_TEXT), st.text()
)
values = st.recursive(
  leaves,
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=5), inner, max_size=3)
  ),
  max_leaves=5,
)


def _paths(node: Any, path: tuple = ()) -> Iterator[tuple]:
  """Yields the places of all values within JSON, but of the whole."""
  if isinstance(node, dict | list):
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
      yield (*path, key)
      yield from _paths(value, (*path, key))


def changes(usual: Any, document: Any) -> dict[str, Any]:
  """Returns the values of JSON that are others than usual, by their places."""
  found, expected = (
    {path: _at(whole, path) for path in _paths(whole)}
    for whole in (document, usual)
  )
  different = {
    ".".join(map(str, path)): value
    for path, value in found.items()
    if not isinstance(value, dict | list)
    if repr(expected.get(path, ...)) != repr(value)
  }
  gone = [path for path in expected if path not in found]
  return different | {".".join(map(str, path)): "(gone)" for path in gone}


def _at(node: Any, path: tuple) -> Any:
  return functools.reduce(lambda node, key: node[key], path, node)


@st.composite
def changed(draw, document: Any) -> Any:
  """Draws JSON of which one to three values are others, gone or new."""
  document = copy.deepcopy(document)
  for _ in range(draw(st.integers(1, 3))):
    places = list(_paths(document))
    if not places:
      break
    *path, last = draw(st.sampled_from(places))
    node = _at(document, tuple(path))
    action = draw(
      st.sampled_from(("set", "set", "set", "remove", "add", "like"))
    )
    if action == "remove":
      del node[last]
    elif action == "add" and isinstance(node, dict):
      node[draw(st.text(max_size=5))] = draw(values)
    elif action == "like":  # of the same type
      node[last] = draw(_like(node[last]))
    else:
      node[last] = draw(values)
  return document


def _like(value: Any) -> st.SearchStrategy[Any]:
  if isinstance(value, bool):
    return st.booleans()
  if isinstance(value, int | float):
    return numbers
  return st.sampled_from(STRANGE_TEXT)


@st.composite
def mangled(draw, content: bytes) -> bytes:
  """Draws bytes of which some are cut off, flipped, doubled or strange."""
  mangled = bytearray(content)
  for _ in range(draw(st.integers(1, 3))):
    start = draw(st.integers(0, max(0, len(mangled) - 1)))
    stop = min(len(mangled), start + draw(st.integers(1, 40)))
    action = draw(st.sampled_from(("cut", "flip", "remove", "double", "put")))
    if action == "cut":
      del mangled[start:]
    elif action == "flip" and mangled:
      mangled[start] ^= 1 << draw(st.integers(0, 7))
    elif action == "remove":
      del mangled[start:stop]
    elif action == "double":
      mangled[start:start] = mangled[start:stop]
    else:
      mangled[start:stop] = draw(
        st.binary(max_size=8)
        | st.sampled_from(
          [b"\xff\xfe", b"\0" * 9, b"[" * 5000, b'{"a":' * 2000]
        )
      )
  return bytes(mangled)


def json_file(document: Any) -> st.SearchStrategy[bytes]:
  """Returns a strategy: a file of JSON, changed in its values or its bytes."""
  text = json.dumps(document)
  return mangled(text.encode()) | changed(document).map(
    lambda held: json.dumps(held).encode(errors="surrogatepass")
  )
