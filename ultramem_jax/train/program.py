"""The training step as the programs that run it."""

import math

import jax

from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.config import Config
from ultramem_jax.train import sharding, step
from ultramem_jax.train import state as state_lib


def abstract_inputs(config: Config, layout: Layout):
  """(state, batch) of a training step, placed on a mesh; nothing is allocated.

  Raises:
    ConfigError: an axis of a parameter that the mesh does not divide.
  """
  batch = sharding.with_sharding(
    step.abstract_batch(config), sharding.batch_sharding(layout.mesh)
  )
  return state_lib.abstract_state(config, layout), batch


def lower_train_step(config: Config, state, batch, layout=None) -> dict:
  """Lowers the training step; nothing is allocated.

  Where the tables' update is sparse, these are two programs: "train", which
  reads the tables, and "update", which writes a few of their rows in place. A
  single program would copy a table that one loop reads and another writes.

  Args:
    config: the run.
    state, batch: abstract arrays with shardings, of the state and a batch.
    layout: of the arrays on a mesh; None: one device.
  Returns:
    {"train": jax.stages.Lowered, "update": the same}, or the first alone.
  """
  rest, tables = state.split_tables()
  shardings = jax.tree.map(lambda x: x.sharding, (rest, tables))
  train = step.jitted(
    step.gradient_step,
    config,
    layout,
    donate_argnums=0,
    out_shardings=(shardings[0], None, None),
  ).lower(rest, tables, batch)
  if not tables:
    return {"train": train}
  update = step.jitted(
    step.table_step,
    config,
    layout,
    donate_argnums=0,
    out_shardings=(shardings[1], None),
  ).lower(tables, *train.out_info[1:])
  return {"train": train, "update": update}


class TrainProgram:
  """(state, batch) -> (state, metrics), compiled; takes over the state."""

  def __init__(self, config: Config, state, batch, layout=None, options=None):
    """Compiles; nothing is allocated.

    Args:
      config, state, batch, layout: of `lower_train_step`.
      options: of the compiler.
    """
    self._state = state
    self.programs = [
      lowered.compile(options)
      for lowered in lower_train_step(config, state, batch, layout).values()
    ]

  def __call__(self, state: state_lib.TrainState, batch: step.Batch):
    rest, tables = state.split_tables()
    rest, gradients, metrics = self.programs[0](rest, tables, batch)
    if tables:
      tables, metrics = self.programs[1](tables, gradients, metrics)
    return rest.join_tables(tables), metrics

  @property
  def bytes_needed(self) -> int:
    """Bytes that each device holds at most, the state included."""
    state = sum(
      math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
      for x in jax.tree.leaves(self._state)
    )
    needs = []
    kept = 0  # outputs of the programs before, which are still there
    for compiled in self.programs:
      memory = compiled.memory_analysis()
      kept += memory.output_size_in_bytes - memory.alias_size_in_bytes
      needs.append(state + kept + memory.temp_size_in_bytes)
    return max(needs)
