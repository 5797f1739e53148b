"""How rare the rows of tables are in other text, by which rows are chosen.

It is read from counts (`runs/row_counts.py`) when a run starts, and does not
change while it trains.
"""

import hashlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.ops import row_choice
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.runs import row_counts
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config
from ultramem_jax.train import sharding, trainable
from ultramem_jax.train.tables import is_table

FIELD = "optim.table_counts"


def table_rows(config: Config) -> dict[str, int]:
  """Returns the number of rows of each table whose rows a run chooses."""
  if not config.optim.chooses_rows:
    return {}
  shapes = sharding.parameter_shapes(config.model)
  return {
    path: shapes[path][0]
    for path in sorted(shapes)
    if is_table(path) and trainable.is_trainable(path, config.optim.trainable)
  }


def read(config: Config) -> dict[str, np.ndarray]:
  """Reads how rare the rows of each table are; {} if a run chooses none.

  Returns:
    [I] float32 by path, of `row_choice.rarity`; -inf: the row is never chosen,
    as too many texts read it.
  Raises:
    ConfigError: no table is trained; the counts are absent, damaged or of
      other tables; or no row is left to choose.
  """
  optim = config.optim
  if not optim.chooses_rows:
    return {}
  rows = table_rows(config)
  require(
    bool(rows),
    "optim.table_rows",
    optim.table_rows,
    f"must be all where no table is trained: optim.trainable = "
    f"{optim.trainable}",
  )
  counts = row_counts.load(row_counts.find(optim.table_counts), FIELD)
  for path, num_rows in rows.items():
    counted = counts.reads.get(path)
    require(
      counted is not None and counted.size == num_rows,
      FIELD,
      optim.table_counts,
      f"is of another model: {path} has {num_rows} rows here, and "
      f"{'is absent' if counted is None else counted.size} there",
    )
  if optim.table_rows == "tfidf":
    kind, totals = counts.texts, dict.fromkeys(rows, counts.num_texts)
  else:
    kind = counts.reads
    totals = {path: int(count_I.sum()) for path, count_I in kind.items()}
  most = optim.table_max_share * counts.num_texts
  is_free = {path: counts.texts[path] <= most for path in rows}
  require(
    any(free_I.any() for free_I in is_free.values()),
    "optim.table_max_share",
    optim.table_max_share,
    f"leaves no row to update: more of the texts of {optim.table_counts} read "
    "every row. Take a larger share, or a larger table",
  )
  return {
    path: np.where(
      is_free[path],
      row_choice.rarity(kind[path], optim.table_rows, totals[path]),
      np.float32(-np.inf),
    )
    for path in rows
  }


def inputs(config: Config) -> dict[str, dict[str, str]]:
  """Returns the counts as `runs.inputs` records what a run reads.

  Raises:
    ConfigError: of `row_counts.load`.
  """
  if not config.optim.chooses_rows:
    return {}
  path = row_counts.find(config.optim.table_counts)
  counts = row_counts.load(path, FIELD)
  # Files with the same counts need not have the same bytes.
  digest = hashlib.blake2b(digest_size=16)
  for kind in (counts.reads, counts.texts):
    for name, count_I in sorted(kind.items()):
      digest.update(name.encode() + count_I.tobytes())
  return {FIELD: {path.name: f"{counts.num_texts} texts, {digest.hexdigest()}"}}


def abstract(config: Config, layout: Layout) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of what `place` places, split as counters are."""
  return {
    path: jax.ShapeDtypeStruct(
      (size,), jnp.float32, sharding=sharding.counter_sharding(layout, size)
    )
    for path, size in table_rows(config).items()
  }


def place(
  rarity: Mapping[str, np.ndarray], config: Config, layout: Layout
) -> dict[str, jax.Array]:
  """Puts the rarity of rows on the devices; KeyError if a table has none."""
  return {
    path: jax.make_array_from_callback(
      wanted.shape, wanted.sharding, rarity[path].__getitem__
    )
    for path, wanted in abstract(config, layout).items()
  }
