"""Runs of imported models, with and without a memory."""

import numpy as np

from ultramem_jax import Transformer, testing
from ultramem_jax.runs import checkpoint, origin
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.testing import MODEL
from ultramem_jax.tools import pretrained

TOKENS_BT = np.arange(24).reshape(2, 12)
MEMORY = {
  name.removeprefix("model.memory."): value
  for name, value in MODEL.items()
  if name.startswith("model.memory.")
}


def import_run(folder, workdir, memory=None):
  config = testing.small_config(model__memory__kind="none")
  pretrained.import_run(str(folder), workdir, config, memory=memory)
  return workdir


def run_with_memory(narrow, folder, **settings):
  """Returns the workdir of a run at step 3."""
  start = import_run(narrow, folder / "start")
  fields = config_lib.to_dict(workdir_lib.load_config(start))
  fields["model"]["memory"] |= {"kind": "ultramem", **MEMORY, **settings}
  config = config_lib.parse(fields)
  variables = testing.random_variables(Transformer(config.model), TOKENS_BT)
  variables["params"] |= load_lib.load(start).variables["params"]
  workdir = folder / "memory"
  workdir_lib.claim(workdir, config, workdir_lib.load_corpus(start))
  origin.copy(start, workdir)
  with checkpoint.Checkpointer(workdir, keep=1) as checkpointer:
    checkpointer.save(3, variables, {}, None)
  return workdir
