"""Pretrained models: Llama, Mistral, Qwen2, Qwen3, OLMo 2; in and out.

  pretrained = open_folder("SmolLM2-135M")
  params = read_params(pretrained, ModelConfig(**pretrained.fields, ...), ...)

`tools.pretrained` makes a run of one, and `tools.export` writes a run's model.
A family (`families.py`) is a function from `config.json` to fields of
ModelConfig, `config_json.py` goes back, and tensors have the names of
`names.py`. What we do not know is refused, and nothing is left out in silence.
"""

from ultramem_jax.interop.pretrained.config_json import make_settings
from ultramem_jax.interop.pretrained.gguf_file import SUFFIX, open_file
from ultramem_jax.interop.pretrained.memory import (
  Memory,
  open_memory,
  read_memory,
  require_backbone,
  write_memory,
)
from ultramem_jax.interop.pretrained.model import (
  Pretrained,
  entries,
  family_entries,
  open_folder,
  read_params,
)
from ultramem_jax.interop.pretrained.write import Backbone, write_backbone

__all__ = [
  "SUFFIX",
  "Backbone",
  "Memory",
  "Pretrained",
  "entries",
  "family_entries",
  "make_settings",
  "open_file",
  "open_folder",
  "open_memory",
  "read_memory",
  "read_params",
  "require_backbone",
  "write_backbone",
  "write_memory",
]
