"""Parts of a memory that only weights from elsewhere have."""

import dataclasses

from ultramem_jax.settings.checks import require_at_least, require_types


@dataclasses.dataclass(frozen=True)
class ImportedWeights:
  """Parameters beyond the paper's that imported weights bring; none by default.

  `interop` sets them to hold the authors' weights. Every field is explained in
  `configs/default.py`.
  """

  spare_queries: int = 0
  norm_bias: bool = False
  query_bias: bool = False
  projection_bias: bool = False
  output_gate: bool = False

  def __post_init__(self):
    path = "model.memory.imported"
    require_types(path, self)
    require_at_least(path, self, 0, "spare_queries")
