"""Reads pretrained models: Llama, Mistral, Qwen2, Qwen3, OLMo 2.

  pretrained = open_folder("SmolLM2-135M")
  params = read_params(pretrained, ModelConfig(**pretrained.fields, ...), ...)

`tools.pretrained` makes a run of one. A family (`families.py`) is a function
from `config.json` to fields of ModelConfig, and its tensors have the names of
`names.py`. What we do not know is refused, and nothing is left out in silence.
"""

from ultramem_jax.interop.pretrained.model import (
  Pretrained,
  entries,
  open_folder,
  read_params,
)

__all__ = ["Pretrained", "entries", "open_folder", "read_params"]
