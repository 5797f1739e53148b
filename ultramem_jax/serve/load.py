"""Loads a trained model from a workdir to the devices of this machine."""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from ultramem_jax.model import Transformer
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.runs import checkpoint, distributed, inputs
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config, MeshConfig
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train import sharding
from ultramem_jax.train import state as state_lib


class TrainedModel(NamedTuple):
  """A model with the parameters of a checkpoint.

  config: the run's config, with the tokenizer in its workdir, a mesh of these
    devices and a batch_size that they divide.
  step: number of optimizer steps that the checkpoint had done.
  model, variables: logits_BTV = model.apply(variables, tokens_BT).
  layout: how the variables lie on the mesh; the model has the same.
  """

  config: Config
  step: int
  model: Transformer
  variables: dict[str, Any]
  layout: Layout


def load(
  workdir: str | os.PathLike,
  step: int | str = "newest",
  mesh: Mapping[str, Any] | None = None,
) -> TrainedModel:
  """Loads a model without its optimizer; each device gets its own part.

  Args:
    workdir: the run's directory.
    step: which checkpoint: "newest", "best" (by validation loss), or the
      number of a saved step.
    mesh: fields of config.mesh that differ from the run's. By default its
      data axis takes the remaining devices; a single device needs no mesh.
  Raises:
    ConfigError: no run in the workdir, no such choice, or a mesh that does not
      fit these devices.
    errors.CheckpointError: the checkpoint does not exist, or is damaged.
  """
  require(
    step in ("newest", "best") or str(step).isdecimal(),
    "step",
    step,
    "must be newest, best, or the number of a step",
  )
  bound = inputs.own_tokenizer(workdir_lib.load_config(workdir), workdir)
  config = on_these_devices(bound, mesh or {})
  layout = sharding.make_layout(config, mesh_lib.make(config))
  state = state_lib.abstract_state(config, layout)
  restored = checkpoint.restore(workdir, state.variables(), step)
  return TrainedModel(
    config,
    restored.step,
    Transformer(config.model, layout),
    restored.items,
    layout,
  )


def on_these_devices(config: Config, mesh: Mapping[str, Any]) -> Config:
  """Returns the config to use a run's model here, whatever trained it.

  Args:
    config: the run's.
    mesh: as for `load`.
  """
  devices = len(distributed.devices())
  fields = config_lib.to_dict(config)
  if devices == 1:
    fields["mesh"] = {}
  fields["mesh"] = {**fields["mesh"], "data": MeshConfig.data, **mesh}
  inside = config_lib.parse(fields).mesh
  # A batch that the devices divide: with `eval_batches`, that is more text.
  split = max(1, devices // (inside.tensor * inside.table))
  fields["batch_size"] += -fields["batch_size"] % split
  fields["accumulation_steps"] = 1
  # No moments are loaded, whose form would decide how tables lie.
  fields["optim"]["table_second_moment"] = "element"
  if jax.default_backend() != "gpu":
    fields["model"]["attention"] = "xla"
  return config_lib.parse(fields)
