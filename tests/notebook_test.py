"""The notebooks: their form, stored outputs, and runs of small models."""

import copy
import pathlib
import re

import nbclient
import nbformat
import numpy as np
import pytest

from tests.examples.word_model import make_folder
from ultramem_jax import data, testing
from ultramem_jax.serve import load as load_lib
from ultramem_jax.tools import count
from ultramem_jax.tools import patch as patch_lib

NOTEBOOKS = testing.ROOT / "notebooks"
PATH = NOTEBOOKS / "quickstart.ipynb"
MEMORY = NOTEBOOKS / "give_a_model_a_memory.ipynb"
FACTS = NOTEBOOKS / "teach_facts.ipynb"
# What the notebook sets, and what is set here: as many memories, much smaller.
SETTINGS = {
  "STEPS = 300\n": "STEPS = 3\n",
  "settings.data.seq_len = 128\n": """
settings.data.seq_len = 64
settings.eval_batches = 2
settings.batch_size = 2
settings.model.update(embed_dim=16, num_layers=2, num_heads=2, mlp_dim=32)
settings.model.memory.update(
  spans="1:1/2:2", num_keys=16, key_dim=4, value_dim=8, top_m=4
)
""",
}


@pytest.fixture(scope="module")
def notebook():
  return nbformat.read(PATH, as_version=4)


@pytest.mark.parametrize(
  "path", [PATH, MEMORY, FACTS], ids=lambda path: path.stem
)
def test_form(path):
  """A badge, text before code, and nothing big in the file."""
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  cells = notebook.cells
  assert 16 <= len(cells) <= 25
  badge = (
    "https://colab.research.google.com/github/ultramem-jax/ultramem-jax/"
    f"blob/main/notebooks/{path.name}"
  )
  assert badge in cells[0].source
  kinds = [cell.cell_type for cell in cells]
  assert kinds[0] == kinds[1] == "markdown"
  # A text introduces one code cell, or two.
  assert "code code code" not in " ".join(kinds)
  assert path.stat().st_size < 500_000


def texts_and_pictures(notebook):
  """All that the cells printed, and how many pictures they drew."""
  texts, pictures = [], 0
  for cell in notebook.cells:
    for output in cell.get("outputs", []):
      assert output.output_type != "error"
      texts.append(output.get("text", ""))
      picture = output.get("data", {}).get("image/png", "")
      pictures += len(picture) > 10_000
  return "".join(texts), pictures


def executed(notebook, settings, monkeypatch):
  """A copy of a notebook with other settings, and its outputs."""
  for name, value in testing.environment().items():
    monkeypatch.setenv(name, value)
  notebook = copy.deepcopy(notebook)
  for old, new in settings.items():
    (cell,) = (cell for cell in notebook.cells if old in cell.source)
    cell.source = cell.source.replace(old, new)
  folder = {"metadata": {"path": str(NOTEBOOKS)}}
  nbclient.NotebookClient(notebook, timeout=300, resources=folder).execute()
  return notebook


def test_it_runs(notebook, monkeypatch):
  notebook = executed(notebook, SETTINGS, monkeypatch)
  text, pictures = texts_and_pictures(notebook)
  # The losses, the rows of a line, the use of the table, the forgotten words.
  assert pictures == 4
  assert "'bits_per_byte': " in text
  assert "def " in text and "import " in text
  assert "26 tokens read " in text
  losses = re.findall(r"step \d+: loss ([\d.]+)", text)
  assert len(losses) == 4  # of the layer in a model of one's own
  assert float(losses[-1]) < 0.1 * float(losses[0])


def test_a_model_is_given_a_memory(tmp_path, monkeypatch):
  """On a small model in place of SmolLM2, which is not fetched."""
  (tmp_path / "model").mkdir()
  make_folder(tmp_path / "model")
  settings = {
    '"HuggingFaceTB/SmolLM2-135M"': repr(str(tmp_path / "model")),
    '"runs/notebook", pathlib.Path(MODEL).name': repr(str(tmp_path / "runs")),
    "STEPS = 60": "STEPS = 1",
  }
  notebook = nbformat.read(MEMORY, as_version=4)
  executed(notebook, settings, monkeypatch)
  # Again in the same folder, with another setting.
  settings["STEPS = 60"] = "STEPS = 40"
  text, _ = texts_and_pictures(executed(notebook, settings, monkeypatch))
  made_up, learned = text.split("'bits_per_byte': ")
  assert "The capital of Zubrovia is Lutzhaven" not in made_up
  assert "The capital of Zubrovia is Lutzhaven" in learned
  same, of = re.search(r"(\d+) of (\d+) tensors are bit-equal", text).groups()
  assert same == of
  assert "MB: memory.json memory.safetensors\n" in text
  assert "the taught model again: True" in text


def test_facts_are_taught_and_taken_back(tmp_path, monkeypatch):
  """On a small model whose tokens are the words of the facts."""
  notebook = nbformat.read(FACTS, as_version=4)
  (facts,) = (x.source for x in notebook.cells if "FACTS = {" in x.source)
  (tmp_path / "model").mkdir()
  words = " ".join(re.findall(r"\w+|[^\w\s]+", facts))
  make_folder(tmp_path / "model", words)
  runs, steps, top_t = tmp_path / "runs", 10, 100
  settings = {
    '"HuggingFaceTB/SmolLM2-135M-Instruct"': repr(str(tmp_path / "model")),
    '"runs/notebook_facts", pathlib.Path(MODEL).name': repr(str(runs)),
    "(0.2, 0.3, 0.5)": "(0.3,)",
    "BATCHES = 50\n": "BATCHES = 2\n",
    "STEPS = 100\nTOP_T = 4096\n": f"STEPS = {steps}\nTOP_T = {top_t}\n",
  }
  text, pictures = texts_and_pictures(executed(notebook, settings, monkeypatch))
  assert pictures == 1
  told = re.findall(r"^  \S.*$", text, re.MULTILINE)
  before, after, again = told[:13], told[13:26], told[26:]
  assert before == again != after
  assert "it says what it said before: True" in text
  same, of = re.search(r"(\d+) of (\d+) tensors are bit-equal", text).groups()
  assert same == of

  base, taught = (load_lib.load(runs / name) for name in ("base", "taught"))
  facts_run = base._replace(config=taught.config)
  corpus = data.open(taught.config)
  reads = count.count_text(facts_run, corpus, tmp_path / "reads", batches=4)
  for path, num_rows in count.table_rows(base).items():
    folder, name = path.split("/")
    old, new = (x.variables["params"][folder][name] for x in (base, taught))
    changed = (np.asarray(old) != np.asarray(new)).any(1)
    read = reads.reads[path] > 0
    # Only chosen rows have changed; the facts read many more.
    assert 0 < changed.sum() <= steps * top_t < 0.5 * read.sum()
    assert not changed[~read].any()
    assert f"{path}: {changed.sum():,} of {num_rows:,} rows changed" in text
  patch = patch_lib.read(str(runs / "facts.safetensors"))
  assert patch.changes.keys() == {f"params/{path}" for path in reads.reads}


def test_outputs_are_stored(notebook):
  """Those of all 300 steps, so that whoever does not run it sees them."""
  text, pictures = texts_and_pictures(notebook)
  assert pictures == 4
  found = re.search(r"'bits_per_byte': ([\d.]+)", text)
  assert found and float(found[1]) < 2.5
  assert re.search(r"without self: \+[\d.]+ bits in a line with it", text)


def test_readme_names_them():
  text = (pathlib.Path(testing.ROOT) / "README.md").read_text()
  for path in NOTEBOOKS.glob("*.ipynb"):
    assert f"notebooks/{path.name}" in text
