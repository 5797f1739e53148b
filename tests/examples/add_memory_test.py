"""The example that teaches a pretrained model, on a small one made here."""

import json

from tests.examples.word_model import EXAMPLE, make_folder
from ultramem_jax import testing


def test_it_teaches_a_model_that_it_imports(tmp_path):
  folder = tmp_path / "model"
  folder.mkdir()
  make_folder(folder)
  status, output, errors = testing.finish(
    testing.start(
      [
        "-m",
        f"examples.{EXAMPLE.stem}",
        f"--pretrained={folder}",
        f"--runs={tmp_path / 'runs'}",
        "--steps=40",
      ]
    )
  )
  assert status == 0, errors
  before, after = output.split("after:")
  assert "The capital of Zubrovia is Lutzhaven" not in before
  assert "The capital of Zubrovia is Lutzhaven" in after
  held = json.loads((tmp_path / "runs/taught/config.json").read_text())
  assert held["config"]["init_from"] == str(tmp_path / "runs/pretrained")
