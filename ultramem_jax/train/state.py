"""What a run carries from step to step."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from ultramem_jax.model import Transformer
from ultramem_jax.ops.row_update import Table
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.config import Config
from ultramem_jax.train import optim, sharding
from ultramem_jax.train import tables as tables_lib

# Names of moments, in the order of `Table`'s fields after the first.
MOMENTS = ("mean", "variance", "step")


class TrainState(struct.PyTreeNode):
  """All that a run carries from step to step.

  step: int32 scalar, optimizer steps taken.
  params, buffers: the model's collections.
  usage: {memory: [E * I] int32}, reads of each virtual row since the last
    report; as tables, with a few more where `row_multiple` says so.
  opt_state: of `optim.make_optimizer`, for the tables only where their update
    is dense.
  moments: of the tables where it is sparse, else {}; a tree like params for
    each name of `optim.table_moments`.
  key: uint32 data of the PRNG key from which each step's is folded.
  """

  step: jax.Array
  params: Any
  buffers: Any
  usage: dict[str, jax.Array]
  opt_state: Any
  moments: dict[str, Any]
  key: jax.Array

  def split_tables(self) -> tuple["TrainState", dict[str, Table]]:
    """The state without its tables, and those whose update is sparse."""
    if not self.moments:
      return self, {}
    params, values = tables_lib.split_tables(self.params)
    _, moments = tables_lib.split_tables(self.moments)
    tables = {
      path: Table(
        values_IW, *(moments.get(f"{name}/{path}") for name in MOMENTS)
      )
      for path, values_IW in values.items()
    }
    return self.replace(params=params, moments={}), tables

  def join_tables(self, tables: dict[str, Table]) -> "TrainState":
    """The state that `split_tables` took apart."""
    if not tables:
      return self
    moments = {
      f"{name}/{path}": moment
      for path, table in tables.items()
      for name, moment in zip(MOMENTS, table[1:], strict=True)
      if moment is not None
    }
    return self.replace(
      params=tables_lib.join_tables(self.params, values_of(tables)),
      moments=tables_lib.join_tables({}, moments),
    )

  def to_items(self) -> dict[str, Any]:
    """The parts a checkpoint keeps apart: evaluation needs the first two."""
    rest = self.replace(params={}, buffers={})
    return {"params": self.params, "buffers": self.buffers, "rest": rest}

  @classmethod
  def from_items(cls, items: dict[str, Any]) -> "TrainState":
    """The state of which `to_items` gave the parts."""
    return items["rest"].replace(
      params=items["params"], buffers=items["buffers"]
    )


def values_of(tables: dict[str, Table]) -> dict[str, jax.Array]:
  """The values of tables, without their moments."""
  return {path: table.values_IW for path, table in tables.items()}


def init_state(config: Config, layout: Layout | None = None) -> TrainState:
  """The state before the first step; deterministic in config.seed."""
  model = Transformer(config.model, layout)
  key = jax.random.key(config.seed)
  tokens_BT = jnp.zeros((1, config.data.seq_len), jnp.int32)
  variables = nn.meta.unbox(model.init(jax.random.fold_in(key, 0), tokens_BT))
  memory = config.model.memory
  params = trained = variables["params"]
  moments = {}
  if optim.updates_rows(config):
    trained, tables = tables_lib.split_tables(params)
    moments = tables_lib.join_tables(
      {},
      {
        f"{name}/{path}": moment
        for path, values_IW in tables.items()
        for name, moment in optim.table_moments(
          config.optim, values_IW.shape
        ).items()
      },
    )
  optimizer = optim.make_optimizer(config.optim, config.steps)
  return TrainState(
    step=jnp.int32(0),
    params=params,
    buffers=variables.get("buffers", {}),
    usage={
      f"memory_{span.index}": jnp.zeros(memory.stored_slots, jnp.int32)
      for span in config.model.spans
    },
    opt_state=optimizer.init(trained),
    moments=moments,
    key=jax.random.key_data(jax.random.fold_in(key, 1)),
  )


def abstract_state(config: Config, layout: Layout) -> TrainState:
  """Shapes, dtypes and shardings of `init_state`; nothing is allocated."""
  state = jax.eval_shape(functools.partial(init_state, config))
  return sharding.with_sharding(
    state, sharding.state_shardings(state, config, layout)
  )
