"""The command that trains a BPE tokenizer."""

import re
import subprocess
import sys
from pathlib import Path

from ultramem_jax.data import tokenizer

ROOT = Path(__file__).parents[2]


def run_train_bpe(*arguments):
  return subprocess.run(
    [
      sys.executable,
      "-m",
      "ultramem_jax",
      "train-bpe",
      "--config=configs/tiny.py",
      *arguments,
    ],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def test_train_command(tmp_path):
  """Trains on the files a config names, and the result loads."""
  (tmp_path / "a.py").write_text("def function(argument):\n  pass\n" * 50)
  output = tmp_path / "tokenizer.json"
  done = run_train_bpe(
    "--config.data.source=text",
    f"--config.data.path={tmp_path}/*.py",
    f"--config.data.valid_path={tmp_path}/*.py",
    "--vocab_size=300",
    f"--output={output}",
  )
  assert done.returncode == 0, done.stderr
  assert re.search(r"--config.model.vocab_size=\d+", done.stdout)
  loaded = tokenizer.load(str(output))
  assert len(loaded.encode(" function")) == 1
  assert [path.name for path in tmp_path.iterdir()].count("a.py") == 1
  assert len(list(tmp_path.iterdir())) == 2


def test_train_command_fails_in_one_line(tmp_path):
  done = run_train_bpe("--vocab_size=9", f"--output={tmp_path}/t.json")
  assert done.returncode == 2
  assert done.stderr == "error: --vocab_size = 9: must be at least 259\n"
  done = run_train_bpe(f"--output={tmp_path}")
  assert done.returncode == 2
  assert done.stderr.endswith("must be a file of an existing directory\n")
  assert not list(tmp_path.iterdir())
