"""Weights of other programs, in and out.

A pretrained model of Hugging Face, or of llama.cpp:

  model, variables = from_pretrained("SmolLM2-135M")
  to_pretrained("SmolLM2-mine", model, variables)

The authors' PyTorch weights, as numpy arrays by name:

  layer, variables = from_official("ultramem_v1", state_dict, **settings)
  named = to_official("ultramem_v1", variables, **settings)

In this package a tensor is theirs and an array is ours. Every layer has a table
of `tensors.Entry`, one for each tensor: how its axes are split and moved, and
which arrays result. The tables are linear, so that gradients pass through them
as parameters do.

`settings` are the authors' constructor arguments and the fields of their
configuration, in one dict. A setting that does not change what a layer computes
is ignored. One that we cannot express raises a ConfigError that names it.
"""

from ultramem_jax.interop.files import load
from ultramem_jax.interop.official.layers import from_official, to_official
from ultramem_jax.interop.official.models import (
  from_official_model,
  to_official_model,
)
from ultramem_jax.interop.pretrained import from_pretrained, to_pretrained

__all__ = [
  "from_official",
  "from_official_model",
  "from_pretrained",
  "load",
  "to_official",
  "to_official_model",
  "to_pretrained",
]
