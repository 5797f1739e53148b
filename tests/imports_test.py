"""Imports run one way: each room of the package uses only rooms above it."""

import ast
import pathlib

from ultramem_jax import testing

PACKAGE = testing.ROOT / "ultramem_jax"

# What each room may import, in an order in which no arrow points back up. A
# room is a folder of the package, or a module beside the folders; or `configs`,
# which imports settings, and what a workdir holds, of the package.
ALLOWED = {
  "settings": "",
  "configs": "",
  "ops/cpu": "",
  "ops": "settings ops/cpu",
  "ops/kernels": "ops",
  "ops/sharded": "ops ops/cpu",
  "layers": "settings ops ops/cpu ops/kernels ops/sharded",
  "model": "settings ops layers ops/sharded",
  "runs": "settings",
  "train": "settings ops ops/cpu ops/sharded layers model runs",
  "data": "settings",
  "interop": "settings layers model runs",
  "serve": "settings ops/sharded layers model runs train data",
  "evaluation": "settings ops/sharded model runs train data serve",
  "tools": "settings ops ops/sharded model runs train data interop serve "
  "evaluation",
  "cli": "settings runs",
  "commands": "settings configs cli runs train data interop serve evaluation "
  "tools",
  "testing": "settings configs runs train",
  "__init__": "settings ops ops/sharded layers model train interop",
  "__main__": "cli commands",
}


def room(path: pathlib.Path) -> str:
  """Returns the room of a module or folder of the package."""
  *folders, name = path.relative_to(PACKAGE).with_suffix("").parts
  return next(
    (x for x in ("/".join(folders[:2]), *folders[:1]) if x in ALLOWED),
    "/".join([*folders, name]),
  )


def arrows():
  """Yields (importing file, its room, imported room), within the package."""
  for path in PACKAGE.rglob("*.py"):
    for node in ast.walk(ast.parse(path.read_text())):
      names = []
      if isinstance(node, ast.ImportFrom) and node.module:
        names = [f"{node.module}.{alias.name}" for alias in node.names]
      elif isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
      for name in names:
        if name.startswith("configs."):
          yield path, room(path), "configs"
        if name.startswith("ultramem_jax."):
          target = PACKAGE.parent.joinpath(*name.split("."))
          if not (target.is_dir() or target.with_suffix(".py").exists()):
            target = target.parent  # the name is one of a module
          # A module of its own may be named like its folder.
          yield (
            path,
            room(path),
            room(target / "_" if target.is_dir() else target),
          )


def test_configs_import_settings_and_runs():
  names = {
    node.module
    for path in (testing.ROOT / "configs").glob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.ImportFrom) and node.module
  }
  rooms = {".".join(x.split(".")[:2]) for x in names if "ultramem_jax" in x}
  assert rooms == {"ultramem_jax.settings", "ultramem_jax.runs"}


def test_no_arrow_points_back_up():
  seen = set()
  for name, above in ALLOWED.items():
    assert set(above.split()) <= seen, name
    seen.add(name)


def test_rooms_import_only_what_they_may():
  found = set(arrows())
  assert len(found) > 100
  for path, here, there in found:
    assert here == there or there in ALLOWED[here].split(), (
      f"{path.relative_to(PACKAGE)} imports {there}"
    )
