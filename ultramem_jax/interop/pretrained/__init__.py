"""Pretrained models: Llama, Mistral, Qwen2, Qwen3, OLMo 2; in and out.

  model, variables = from_pretrained("SmolLM2-135M")
  to_pretrained("SmolLM2-mine", model, variables)

`tools.pretrained` makes a run of one, and `tools.export` writes a run's model.
A family (`families.py`) is a function from `config.json` to fields of
ModelConfig, `config_json.py` goes back, and tensors have the names of
`names.py`. What we do not know is refused, and nothing is left out in silence.
"""

from ultramem_jax.interop.pretrained.config_json import make_settings
from ultramem_jax.interop.pretrained.gguf_file import open_file
from ultramem_jax.interop.pretrained.model import (
  Pretrained,
  entries,
  make_pretrained,
  open_folder,
  read_params,
)
from ultramem_jax.interop.pretrained.variables import (
  Opened,
  backbone_digest,
  from_pretrained,
  opened,
  read_variables,
  to_pretrained,
  write_variables,
)
from ultramem_jax.interop.pretrained.write import ASKED

__all__ = [
  "ASKED",
  "Opened",
  "Pretrained",
  "backbone_digest",
  "entries",
  "from_pretrained",
  "make_pretrained",
  "make_settings",
  "open_file",
  "open_folder",
  "opened",
  "read_params",
  "read_variables",
  "to_pretrained",
  "write_variables",
]
