"""The list of commands, and what `import ultramem_jax` brings."""

import pkgutil
import subprocess
import sys

import pytest

import ultramem_jax
from ultramem_jax import commands, testing
from ultramem_jax.train import tables


def run(*arguments):
  """Runs Python in the repository's root: (status, stdout, stderr)."""
  done = subprocess.run(
    [sys.executable, *arguments],
    cwd=testing.ROOT,
    text=True,
    capture_output=True,
  )
  return done.returncode, done.stdout, done.stderr


def test_every_command_is_listed():
  names = {module.name for module in pkgutil.iter_modules(commands.__path__)}
  names -= {"model_flags"}
  assert names == {name.replace("-", "_") for name in commands.SUMMARIES}


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands_with_a_line_each(arguments):
  status, text, errors = run("-m", "ultramem_jax", *arguments)
  assert status == 0 and not errors
  for name, summary in commands.SUMMARIES.items():
    (line,) = [x for x in text.splitlines() if x.startswith(f"  {name} ")]
    assert line.endswith(f" {summary}") and len(line) <= 80


def test_help_imports_no_jax():
  code = (
    "import sys; sys.argv = ['ultramem', '--help']\n"
    "from ultramem_jax.__main__ import main; main()\n"
    "assert not {'jax', 'flax', 'numpy', 'absl'} & {*sys.modules}"
  )
  status, text, errors = run("-c", code)
  assert status == 0 and "generate" in text, errors


@pytest.mark.parametrize(
  ("name", "hint"),
  [
    ("generat", "did you mean generate?"),
    ("train_bpe", "did you mean train-bpe?"),
    ("fly", "--help lists them"),
  ],
)
def test_an_unknown_command_is_told_in_one_line(name, hint):
  status, text, errors = run("-m", "ultramem_jax", name)
  assert (status, text) == (2, "")
  assert errors == f"error: {name!r} is not a command; {hint}\n"


def test_the_package_exports_its_names():
  for name in ultramem_jax.__all__:
    value = getattr(ultramem_jax, name)
    if isinstance(value, tuple):  # names of collections
      assert value == tables.TABLE_COLLECTIONS
      continue
    assert value.__name__.removeprefix("ultramem_jax.") == name
    where = getattr(value, "__module__", value.__name__)
    assert where.startswith("ultramem_jax.")
  with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
    ultramem_jax.Nothing  # noqa: B018
  with pytest.raises(ImportError):
    from ultramem_jax import Nothing  # noqa: F401
