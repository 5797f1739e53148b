"""Metrics of the tables: which rows and keys are read, and norms of rows."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ultramem_jax.ops import precision
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.config import Config
from ultramem_jax.train import sharding
from ultramem_jax.train.state import TrainState
from ultramem_jax.train.usage import Reads

# The norms of this many rows stand for those of a table.
SAMPLED_ROWS = 4096


def report(
  state: TrainState, *, config: Config
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Returns how the tables were used since the last report, and starts anew.

  Returns:
    (state with usage at zero, metrics). For each memory, of rows in reach: the
    share of physical and of virtual rows read; KL(usage of physical rows ||
    uniform) in nats; and, since the start, the shares of physical rows and of
    keys that were never read. For each table: the mean and the largest norm of
    up to `SAMPLED_ROWS` rows.
  """
  seen = jax.tree.map(
    lambda seen, new: seen | (new > 0), state.seen, state.usage
  )
  metrics = {}
  for memory, reads in state.usage.items():
    rows = _row_metrics(config, reads, seen[memory])
    metrics |= {f"{memory}/{name}": value for name, value in rows.items()}
  for path, table in state.tables.items():
    norms = _norm_metrics(table.values_IW)
    metrics |= {f"{path}/{name}": value for name, value in norms.items()}
  usage = jax.tree.map(jnp.zeros_like, state.usage)
  return state.replace(usage=usage, seen=seen), metrics


def reporter(
  config: Config, state: TrainState, layout: Layout
) -> Callable[[TrainState], tuple[TrainState, dict[str, Any]]]:
  """Returns `report`, compiled; it takes over the state.

  Args:
    config: the run.
    state: lies where those to come will.
    layout: of its arrays on a mesh.
  """
  compiled = jax.jit(
    functools.partial(report, config=config),
    donate_argnums=0,
    out_shardings=(
      sharding.shardings_of(state),
      sharding.replicated(layout.mesh),
    ),
  )
  return compiled.lower(state).compile()


def _row_metrics(config: Config, usage: Reads, seen: Reads):
  num_rows = config.model.memory.table_side**2
  num_slots = config.model.memory.grid_side**2
  usage_U = usage.slots[:num_slots]
  usage_I = usage_U.reshape(-1, num_rows).sum(0, dtype=jnp.int32)
  seen_I = seen.slots[:num_slots].reshape(-1, num_rows).any(0)
  # In float32: the reads of all rows between two reports may be more than an
  # int32 holds, as those of a published config are.
  share_I = usage_I / jnp.maximum(usage_I.sum(dtype=jnp.float32), 1)
  return {
    "coverage": (usage_I > 0).mean(),
    "coverage_virtual": (usage_U > 0).mean(),
    "usage_kl": jnp.sum(jax.scipy.special.xlogy(share_I, share_I * num_rows)),
    "rows_never_read": 1 - seen_I.mean(),
    "keys_never_read": 1 - seen.keys.mean(),
  }


def _norm_metrics(values_IW):
  row_i = jnp.arange(0, len(values_IW), -(-len(values_IW) // SAMPLED_ROWS))
  rows_iW = precision.decode(jnp.take(values_IW, row_i, axis=0))
  norm_i = jnp.sqrt(jnp.square(rows_iW).sum(-1))
  return {"row_norm": norm_i.mean(), "row_norm_max": norm_i.max()}
