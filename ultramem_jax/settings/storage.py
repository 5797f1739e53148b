"""Where the table of a memory lies, and in which form."""

import dataclasses

from ultramem_jax.settings.checks import (
  require_at_least,
  require_choice,
  require_types,
)


@dataclasses.dataclass(frozen=True)
class TableStorage:
  """How the tables of a memory are stored, split over devices and read.

  None of it changes what a layer computes, apart from rounding. Every field
  is explained in `configs/default.py`.
  """

  partition: str = "auto"
  row_multiple: int = 1
  table_dtype: str = "float32"
  kernel: str = "xla"

  def __post_init__(self):
    path = "model.memory.storage"
    require_types(path, self)
    require_choice(
      path,
      self,
      "partition",
      "auto",
      "columns",
      "rows",
      "rows_pooled",
      "rows_unpooled",
    )
    require_at_least(path, self, 1, "row_multiple")
    require_choice(path, self, "table_dtype", "float32", "bfloat16", "int8")
    require_choice(path, self, "kernel", "xla", "pallas")

  def stored(self, count: int) -> int:
    """Returns count, rounded up to a multiple of `row_multiple`."""
    return self.row_multiple * -(-count // self.row_multiple)
