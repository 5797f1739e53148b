"""What a run carries from step to step."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from ultramem_jax.model import Transformer
from ultramem_jax.ops.row_update import Table
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.config import Config
from ultramem_jax.train import guard, optim, sharding, trainable, usage
from ultramem_jax.train import tables as tables_lib
from ultramem_jax.train.guard import Guard
from ultramem_jax.train.usage import Reads


class TrainState(struct.PyTreeNode):
  """All that a run carries from step to step.

  step: int32 scalar, optimizer steps taken.
  params: of the model that are trained, without its tables.
  frozen: the others, tables among them.
  tables: {path: Table}, the value tables with their moments; path is where the
    model's parameters have them, such as "memory_0/values".
  opt_state: of `optim.make_optimizer`, for params.
  buffers: the model's collection.
  usage: {memory: `Reads`} of int32, how often each virtual row and key was
    read since the last report; of keys, see `usage.count`.
  seen: as usage, what was read at all up to the last report.
  guard: of the steps that were skipped.
  key: uint32 data of the PRNG key from which each step's is folded.
  """

  step: jax.Array
  params: Any
  frozen: Any
  tables: dict[str, Table]
  opt_state: Any
  buffers: Any
  usage: dict[str, Reads]
  seen: dict[str, Reads]
  guard: Guard
  key: jax.Array

  def variables(self) -> dict[str, Any]:
    """Returns the model's collections, the tables in their places."""
    params = tables_lib.join_tables(self.params, self.tables)
    return {
      "params": trainable.join(params, self.frozen),
      "buffers": self.buffers,
    }

  def to_items(self) -> dict[str, Any]:
    """Returns the parts that a checkpoint keeps apart.

    "params" and "buffers" are all that evaluation needs; "rest" is the state
    without them, of its tables only the moments.
    """
    moments = {path: table[1:] for path, table in self.tables.items()}
    rest = self.replace(params={}, frozen={}, buffers={}, tables=moments)
    return {**self.variables(), "rest": rest}

  @classmethod
  def from_items(cls, items: dict[str, Any], pattern: str) -> "TrainState":
    """Returns the state of which `to_items` made the parts.

    Args:
      items: the parts.
      pattern: `optim.trainable` of the run.
    """
    trained, frozen = trainable.split(items["params"], pattern)
    params, values = tables_lib.split_tables(trained)
    rest = items["rest"]
    return rest.replace(
      params=params,
      frozen=frozen,
      buffers=items["buffers"],
      tables={
        path: Table(values[path], *moments)
        for path, moments in rest.tables.items()
      },
    )


def init_state(
  config: Config, layout: Layout | None = None, seed: jax.Array | None = None
) -> TrainState:
  """Returns the state before the first step.

  Args:
    config: the run.
    layout: of its arrays on a mesh; None: one device.
    seed: uint32 scalar in place of config.seed, so that one compiled program
      makes the states of many seeds.
  """
  model = Transformer(config.model, layout)
  key = jax.random.key(config.seed if seed is None else seed)
  # No parameter depends on the tokens; one is traced fastest.
  token_BT = jnp.zeros((1, 1), jnp.int32)
  variables = model.init(jax.random.fold_in(key, 0), token_BT)
  params = trainable.stored(nn.meta.unbox(variables["params"]), config.optim)
  trained, frozen = trainable.split(params, config.optim.trainable)
  params, tables = tables_lib.take_tables(
    trained, config.optim.moments, config.optim.table_second_moment
  )
  optimizer = optim.make_optimizer(config.optim, config.steps)
  return TrainState(
    step=jnp.int32(0),
    params=params,
    frozen=frozen,
    tables=tables,
    opt_state=optimizer.init(params),
    buffers=nn.meta.unbox(variables.get("buffers", {})),
    usage=usage.new_reads(config.model, jnp.int32),
    seen=usage.new_reads(config.model, jnp.bool_),
    guard=guard.new_guard(),
    key=jax.random.key_data(jax.random.fold_in(key, 1)),
  )


@functools.lru_cache(maxsize=16)
def initializer(
  config: Config, layout: Layout | None = None
) -> Callable[[], TrainState]:
  """Returns the function that makes a run's first state, to be jitted.

  It is the same for the same arguments, so that JAX traces it once.
  """
  return functools.partial(init_state, config, layout)


def abstract_state(config: Config, layout: Layout) -> TrainState:
  """Returns shapes, dtypes and shardings of `init_state`; allocates nothing."""
  state = jax.eval_shape(initializer(config, layout))
  return sharding.with_sharding(
    state, sharding.state_shardings(state, config, layout)
  )
