"""The installed wheel, away from the checkout."""

import json
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from ultramem_jax import testing

PACKAGES = ("configs", "ultramem_jax")
SOURCES = ("pyproject.toml", "requirements.txt", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
  """The folder that the wheel is installed in; its dependencies are here."""
  source = tmp_path_factory.mktemp("source")
  for name in PACKAGES:
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(testing.ROOT / name, source / name, ignore=ignore)
  for name in SOURCES:
    shutil.copy(testing.ROOT / name, source)
  target = tmp_path_factory.mktemp("installed")
  command = "-m pip install --quiet --no-deps --no-index --no-build-isolation"
  subprocess.run(
    [sys.executable, *command.split(), f"--target={target}", source], check=True
  )
  return target


@pytest.fixture
def run(installed, tmp_path):
  """Runs a command in another folder, and returns what it prints."""

  def run(*command):
    done = subprocess.run(
      [sys.executable, *map(str, command)],
      cwd=tmp_path,
      env=testing.environment(PYTHONPATH=str(installed)),
      text=True,
      capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  return run


def test_the_wheel_holds_every_module(installed):
  for name in PACKAGES:
    files = {
      path.relative_to(testing.ROOT)
      for path in (testing.ROOT / name).rglob("*.py")
    }
    assert files == {
      path.relative_to(installed) for path in (installed / name).rglob("*.py")
    }


def test_help(run, installed):
  assert "\n  generate " in run(installed / "bin" / "ultramem", "--help")


def test_configs_are_found_by_name_and_by_path(run, installed, tmp_path):
  mine = tmp_path / "mine.py"
  mine.write_text(
    "from configs import tiny\n"
    "def get_config():\n"
    "  c = tiny.get_config()\n"
    "  c.model.num_heads = 2\n"
    "  return c\n"
  )
  ultramem = installed / "bin" / "ultramem"
  by_name, by_path = (
    json.loads(run(ultramem, "accounting", f"--config={config}", "--json"))
    for config in ("tiny", mine)
  )
  assert by_name["params"] == by_path["params"]
  assert by_name["params"]["sparse"] == 2 * 128**2 * 64


def test_generation(run, tmp_path):
  testing.save_run(tmp_path / "run", testing.small_config())
  command = ["-m", "ultramem_jax", "generate", "--workdir=run", "--prompt=def "]
  text = run(*command, "--num_tokens=3", "--temperature=0")
  assert text.startswith("def ")


def test_the_layer_of_the_readme(run, installed):
  readme = (testing.ROOT / "README.md").read_text()
  blocks = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
  (code,) = [block for block in blocks if "class Net" in block]
  code += "\nimport ultramem_jax; print(y_BTC.shape, ultramem_jax.__file__)"
  assert run("-c", code).split("\n")[-2] == (
    f"(2, 12, 10) {pathlib.Path(installed, 'ultramem_jax', '__init__.py')}"
  )
