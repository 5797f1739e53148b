"""What the README shows works."""

import pathlib
import re

import jax.numpy as jnp

README = pathlib.Path(__file__).parents[1] / "README.md"


def test_layer_in_your_model_runs():
  """The block as a reader would paste it; 15 lines from import to output."""
  blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  (code,) = [block for block in blocks if "class Net" in block]
  names = {}
  exec(code, names)
  assert names["y_BTC"].shape == (2, 12, 10)
  assert set(names["variables"]) == {"params", "buffers"}
  # The memory learns: its auxiliary loss and statistics are there to be used.
  assert set(names["sown"]) == {"losses", "stats"}
  assert jnp.isfinite(names["y_BTC"]).all()


def test_links_and_commands_lead_to_files():
  text = README.read_text()
  links = re.findall(r"\]\((?!http)([^)#]+)\)", text)
  configs = re.findall(r"--config=(configs/\w+\.py)", text)
  assert len(links) >= 3 and len(configs) >= 3
  missing = [
    path for path in {*links, *configs} if not (README.parent / path).exists()
  ]
  assert not missing
