"""The layer of configs/151m_x12.py, as benchmarks.layer measures it."""

EMBED_DIM = 1024
NUM_KEYS = 1100
EXPANSION = 4
GRID_SIDE = 2200  # sqrt(EXPANSION) * NUM_KEYS
NUM_ROWS = NUM_KEYS**2
VALUE_DIM = 512
TOP_M = 42
HEADS = 2
RANK = 2
CORES = 2
KEY_DIM = 250


def read_sets(tokens: int) -> int:
  """Returns how many sets of reads take turns: more than a cache holds."""
  return max(1, 2**28 // (4 * VALUE_DIM * TOP_M * HEADS * tokens))
