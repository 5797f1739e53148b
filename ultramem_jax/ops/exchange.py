"""Tables split over the mesh: what each form moves, and the forms.

P devices share a table. Each of them has its own tokens, K rows to read for
each, which may lie anywhere.

  columns        every device pools its slice of W for the tokens of all, and
                 the slices travel to their tokens (dimension-wise).
  rows_pooled    every device pools the rows it holds for the tokens of all,
                 and the sums travel to their tokens.
  rows_unpooled  rows travel to the device of the token, which pools them
                 (number-wise).
"""

PARTITIONS = ("columns", "rows_pooled", "rows_unpooled")


def bytes_moved(
    partition: str, shards: int, *, reads: int, width: int, cores: int,
    blocks: int, itemsize: int,
) -> float:
  """Bytes that a device receives for each of its tokens, forward.

  The paper (section 3.2 and its figure 9) counts with cores = blocks = 1 and
  itemsize = 2: number-wise 4 K (P - 1) / P + 2 K W (P - 1) / P; dimension-wise
  6 K (P - 1) + 2 W (P - 1) / P.

  Args:
    partition: of `PARTITIONS`.
    shards: P.
    reads: K, rows of a token.
    width: W.
    cores: C, scores of a row.
    blocks: E, pooled vectors of a token.
    itemsize: bytes of a score and of a value as they travel; an index has 4.
  """
  part = (shards - 1) / shards
  vectors = itemsize * blocks * width
  asked = (4 + itemsize * cores) * reads * (shards - 1)
  return {
      "columns": asked + vectors * part,
      "rows_pooled": asked + vectors * (shards - 1),
      "rows_unpooled": (4 + itemsize * width) * reads * part,
  }[partition]
