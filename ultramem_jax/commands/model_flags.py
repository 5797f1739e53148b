"""Flags of the programs that use a trained model: which one, on which mesh."""

import dataclasses

from absl import flags
from ml_collections import ConfigDict, config_flags

from ultramem_jax import cli
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.config import MeshConfig


def define() -> None:
  """Defines --workdir, --step and --mesh.FIELD."""
  flags.DEFINE_string("workdir", None, "Directory of the run.")
  flags.DEFINE_string(
    "step", "newest", "Checkpoint: newest, best, or the number of a step."
  )
  cli.define_section(
    "mesh",
    ConfigDict(dataclasses.asdict(MeshConfig(data=-1))),
    "Another mesh than the run's: --mesh.FIELD=VALUE.",
  )


def load() -> load_lib.TrainedModel:
  """Loads the model that the flags name; raises as `serve.load.load` does."""
  values = flags.FLAGS
  return load_lib.load(
    values.workdir,
    values.step,
    config_flags.get_override_values(values["mesh"]),
  )
