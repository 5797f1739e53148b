"""What the README and the docs show works.

Python snippets run. Commands exist, their flags exist, and a setting that they
change takes the value.
"""

import importlib
import json
import pathlib
import re
import shlex
import shutil
import textwrap
import tomllib

import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from ultramem_jax import testing
from ultramem_jax.commands import SUMMARIES
from ultramem_jax.runs import checkpoint
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings import config as config_lib

ROOT = testing.ROOT
PAGES = {
  str(path.relative_to(ROOT)): path.read_text()
  for path in (*ROOT.glob("*.md"), *sorted((ROOT / "docs").glob("*.md")))
}
FLAG = re.compile(r'DEFINE_\w+\(\s*"(\w+)"')
NO_COMMANDS = {
  ".",
  "cd",
  "for",
  "gcloud",
  "git",
  "hf",
  "mv",
  "pre-commit",
  "srun",
  "tfds",
}


def blocks(page, language):
  return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def commands(page):
  """The words of each command that a page shows, alone or in a sentence."""
  spans = re.findall(r"`((?:python|pytest|make|pip) [^`]*)`", PAGES[page])
  lines = re.sub(r"\\\n", " ", "\n".join(blocks(page, "sh"))).splitlines()
  for line in [*spans, *lines]:
    line = re.sub(r"(^|\s)#.*", "", line)
    for part in line.split("&&"):
      words = shlex.split(part.replace("[", "").replace("]", ""))
      while words and re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
      if words:
        yield words


def flags_of(*paths):
  """The flags that source files define."""
  return {
    name for path in paths for name in FLAG.findall((ROOT / path).read_text())
  }


def flags_of_benchmark(path):
  """The flags of a module or package of benchmarks, and of their harness."""
  files = [ROOT / f"{path}.py"]
  if not files[0].exists():
    files = sorted((ROOT / path).glob("*.py"))
  assert files, path
  return flags_of(*files, *(ROOT / "benchmarks/harness").glob("*.py"))


def check_flag(word, known, settings):
  """A flag such as --batch=8, or --config.steps=8, which goes to settings."""
  name, _, value = word.removeprefix("--").partition("=")
  section, _, field = name.partition(".")
  assert section in known, word
  if value == "...":
    return
  if section == "config" and not field:
    config = pathlib.PurePath(value.partition(":")[0])
    assert config.stem == "NAME" or (ROOT / "configs" / config.name).exists()
    settings[""] = value
  elif section == "config":
    settings[field] = value
  elif field:
    assert field in getattr(default.get_config(), section), word


def check_settings(settings):
  """Parses the config of a command with the values that it sets."""
  name, _, argument = settings.pop("", "configs/default.py").partition(":")
  if pathlib.PurePath(name).stem == "NAME":
    return
  stem = pathlib.PurePath(name).stem
  # The run of which a page takes the settings is not here.
  is_of_run = stem == "from_run"
  module = importlib.import_module(f"configs.{stem}")
  config = (
    default.get_config()
    if is_of_run
    else module.get_config(*([argument] if argument else []))
  )
  flat = config.to_dict()
  for field, text in settings.items():
    node = flat
    *sections, last = field.split(".")
    for section in sections:
      node = node[section]
    old = node[last]
    node[last] = json.loads(text) if isinstance(old, bool) else type(old)(text)
  if not is_of_run:
    config_lib.parse(flat)


def check_python(words):
  """A command that begins with `python`."""
  settings, known = {}, set()
  target, *arguments = words
  if target == "-m":
    target, *arguments = arguments
    if target == "pytest":
      return check_pytest(arguments)
    if target == "ultramem_jax":
      name = arguments.pop(0)
      if name in ("COMMAND", "--help"):
        return None
      assert name in SUMMARIES, name
      command = f"ultramem_jax/commands/{name.replace('-', '_')}.py"
      known = flags_of(
        command, "ultramem_jax/commands/model_flags.py", "ultramem_jax/cli.py"
      )
      if name == "count":
        known |= {"data"}
    else:
      known = flags_of_benchmark(target.replace(".", "/"))
  elif target.endswith(".py"):
    known = flags_of(
      target, "ultramem_jax/commands/model_flags.py", "ultramem_jax/cli.py"
    )
    if target == "eval.py":
      known |= {"data"}
  known |= {"config", "mesh"}
  for word in arguments:
    if word.startswith("--"):
      check_flag(word, known, settings)
  return check_settings(settings)


def check_pytest(arguments):
  path, *options = [word for word in arguments if word != "-q"]
  files = [ROOT / path]
  if files[0].is_dir():
    files = sorted(files[0].rglob("*_test.py"))
    assert files, path
  source = "\n".join(file.read_text() for file in files)
  if options:
    assert options[0] == "-k" and re.search(
      rf"def test_\w*{options[1]}", source
    ), arguments


def check_pip(words):
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
    "optional-dependencies"
  ]
  for word in words:
    if word.startswith(".") and len(word) > 1:
      assert word[1:] in extras, word


@pytest.mark.parametrize("page", [x for x in PAGES if x != "CHANGELOG.md"])
def test_commands_exist(page):
  targets = re.findall(
    r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE
  )
  for first, *rest in commands(page):
    if first == "python":
      check_python(rest)
    elif first == "pytest":
      check_pytest(rest)
    elif first == "make":
      assert rest[0] in targets, rest
    elif first == "pip":
      check_pip(rest)
    else:
      assert first in NO_COMMANDS, first


@pytest.mark.parametrize("page", PAGES)
def test_links_and_paths_lead_to_files(page):
  folder = (ROOT / page).parent
  text = re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL)
  links = re.findall(r"\]\((?!http)([^)#\s]+)", text)
  paths = re.findall(
    r"`((?:configs|docs|examples|tests|ultramem_jax)/[\w/]+\.\w+)", text
  )
  missing = [x for x in links if not (folder / x).exists()]
  missing += [x for x in paths if not (ROOT / x).exists()]
  assert not missing


def test_layer_in_your_model_runs():
  """The block as a reader would paste it; 15 lines from import to output."""
  (code,) = [x for x in blocks("README.md", "python") if "class Net" in x]
  assert len([line for line in code.splitlines() if line]) <= 15
  names = {}
  exec(code, names)
  assert names["y_BTC"].shape == (2, 12, 10)
  assert set(names["variables"]) == {"params", "buffers"}
  # The memory learns: its auxiliary loss and statistics are there to be used.
  assert set(names["sown"]) == {"losses", "stats"}
  assert jnp.isfinite(names["y_BTC"]).all()


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """A folder with a run in runs/a, and a pretrained model, of small models."""
  folder = tmp_path_factory.mktemp("docs")
  config = testing.small_config()
  workdir_lib.claim(folder / "runs/a", config, "no corpus")
  items = testing.random_state(config).to_items()
  with checkpoint.Checkpointer(folder / "runs/a", 1) as saver:
    saver.save(1, items, {})
  pretrained = ROOT / "tests/goldens/hf/llama_gqa_tied"
  shutil.copytree(pretrained, folder / "SmolLM2-135M")
  return folder


def official_weights():
  """A layer of the authors: their settings and tensors."""
  info = json.loads((ROOT / "tests/goldens/v1_a.json").read_text())
  arrays = np.load(ROOT / "tests/goldens/v1_a.npz")
  return {
    "settings": {**info["kwargs"], **info["config"]},
    "state_dict": {
      key.partition("/")[2].replace("/", "."): arrays[key]
      for key in arrays
      if key.startswith(("param/", "buffer/"))
    },
  }


@pytest.mark.parametrize(
  "page", [x for x in PAGES if x != "README.md" and blocks(x, "python")]
)
def test_snippets_run(page, workdir, monkeypatch):
  """The snippets of a page, one after the other, as a reader would."""
  monkeypatch.chdir(workdir)
  names = {**official_weights(), "tokens_BT": np.arange(6).reshape(1, 6)}
  for code in blocks(page, "python"):
    exec(textwrap.dedent(code), names)
