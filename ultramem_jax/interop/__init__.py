"""The authors' PyTorch weights, as numpy arrays under their own names.

  layer, variables = from_official("ultramem_v1", state_dict, **settings)
  named = to_official("ultramem_v1", variables, **settings)

A layer is described by a table of `tensors.Entry`, one for each of their
tensors: how its axes are split and moved, and which arrays of ours result. The
tables are linear in the arrays, so that they carry gradients over as well as
parameters.

Their settings are constructor arguments and fields of their configuration in
one dict. A setting that does not change what the layer computes is ignored,
one that we cannot express is refused by name.
"""

from ultramem_jax.interop.files import load
from ultramem_jax.interop.official.layers import from_official, to_official
from ultramem_jax.interop.official.models import (
  from_official_model,
  to_official_model,
)

__all__ = [
  "from_official",
  "from_official_model",
  "load",
  "to_official",
  "to_official_model",
]
