"""The training step as the programs that run it.

Where the update of tables is sparse these are two: "train" reads the tables and
returns their gradients, "update" writes the rows that were read, in place. A
single program would copy a table that one loop reads and another writes.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.config import Config
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train import optim, sharding, step
from ultramem_jax.train import rarity as rarity_lib
from ultramem_jax.train import state as state_lib
from ultramem_jax.train.state import TrainState


def one_device(config: Config) -> Layout:
  """Returns the layout of a run on one device, the first there is."""
  return sharding.make_layout(config, mesh_lib.make(config, jax.devices()[:1]))


def lower_train_step(
  config: Config, layout: Layout
) -> dict[str, jax.stages.Lowered]:
  """Lowers the training step; nothing is allocated.

  Args:
    config: the run.
    layout: of its arrays on a mesh.
  Returns:
    The programs by name. Where the update of tables is sparse: "train", which
    takes over a state without tables, and reads tables and batch; and
    "update", which takes over the tables, and reads their gradients.
    Otherwise only "train", which takes over the state, and reads the batch.
    "train" also reads how rare rows are, in the order of its other arguments.
  Raises:
    ConfigError: an axis of a parameter that the mesh does not divide.
  """
  state = state_lib.abstract_state(config, layout)
  batch = sharding.with_sharding(
    step.abstract_batch(config), sharding.batch_sharding(layout.mesh)
  )
  lower = functools.partial(_lower, config, layout)
  if not optim.updates_rows(config):
    places = (sharding.shardings_of(state), None)
    return {"train": lower(_whole_step, places, state, batch)}
  rare = rarity_lib.abstract(config, layout)
  tables, state = state.tables, state.replace(tables={})
  places = (sharding.shardings_of(state), None, None)
  train = lower(_model_step, places, state, tables, batch, rare)
  update = lower(
    step.table_step, sharding.shardings_of(tables), tables, train.out_info[1]
  )
  return {"train": train, "update": update}


def _lower(config, layout, function, out_shardings, *arguments):
  return step.jitted(
    function, config, layout, donate_argnums=0, out_shardings=out_shardings
  ).lower(*arguments)


def _whole_step(state: TrainState, batch: step.Batch, **options):
  state, gradients, metrics = step.model_step(state, batch, **options)
  tables = step.table_step(state.tables, gradients, **options)
  return state.replace(tables=tables), metrics


def _model_step(
  state: TrainState, tables, batch: step.Batch, rarity, **options
):
  """Does what `step.model_step` does, but does not give the tables back."""
  state, gradients, metrics = step.model_step(
    state.replace(tables=tables), batch, rarity, **options
  )
  return state.replace(tables={}), gradients, metrics


class TrainProgram:
  """A compiled training step: (state, batch) -> (state, metrics).

  A call takes over the state. Its metrics are float32 scalars by name. Batches
  are those of `step.abstract_batch`.

  Attributes:
    state: shapes, dtypes and shardings of the state.
    programs: the compiled programs of `lower_train_step`, by name.
  """

  def __init__(
    self,
    config: Config,
    layout: Layout | None = None,
    options: dict[str, Any] | None = None,
    rarity: Mapping[str, np.ndarray] | None = None,
  ):
    """Compiles; nothing is allocated but what `rarity` takes.

    Args:
      config: the run.
      layout: of its arrays on a mesh; None: one device.
      options: of the compiler.
      rarity: of the rows of each table, where only some are updated:
        `rarity.read`.
    Raises:
      ConfigError: of `lower_train_step`.
    """
    self._config = config
    self._layout = layout or one_device(config)
    self.state = state_lib.abstract_state(config, self._layout)
    self._rarity = rarity_lib.place(rarity or {}, config, self._layout)
    self.programs = {
      name: lowered.compile(options)
      for name, lowered in lower_train_step(config, self._layout).items()
    }

  def init_state(self) -> TrainState:
    """Makes the state before the first step, where it belongs."""
    init = state_lib.initializer(self._config, self._layout)
    return jax.jit(init, out_shardings=sharding.shardings_of(self.state))()

  def init_around(self, variables: dict[str, Any]) -> TrainState:
    """Makes that state around given parameters and buffers."""

    def init_rest():
      state = state_lib.init_state(self._config, self._layout)
      return state.to_items()["rest"]

    places = sharding.shardings_of(self.state.to_items()["rest"])
    rest = jax.jit(init_rest, out_shardings=places)()
    return self.state_from({**variables, "rest": rest})

  def state_from(self, items: dict[str, Any]) -> TrainState:
    """Returns the state of which `TrainState.to_items` made the parts."""
    return TrainState.from_items(items, self._config.optim.trainable)

  def __call__(
    self, state: TrainState, batch: step.Batch
  ) -> tuple[TrainState, dict[str, jax.Array]]:
    if "update" not in self.programs:
      return self.programs["train"](state, batch)
    tables = state.tables
    state, gradients, metrics = self.programs["train"](
      state.replace(tables={}), tables, batch, self._rarity
    )
    tables = self.programs["update"](tables, gradients)
    return state.replace(tables=tables), metrics

  @property
  def bytes_needed(self) -> int:
    """Bytes that each device holds at most, the state included."""
    state = sharding.device_bytes(self.state)
    needs = []
    kept = 0  # outputs of the programs before, which are still there
    for compiled in self.programs.values():
      memory: Any = compiled.memory_analysis()
      kept += memory.output_size_in_bytes - memory.alias_size_in_bytes
      needs.append(state + kept + memory.temp_size_in_bytes)
    return max(needs)
