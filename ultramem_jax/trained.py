"""A trained model, from the workdir of its run."""

import functools
import os
from typing import Any, NamedTuple

import jax

from ultramem_jax import checkpoint, step
from ultramem_jax import workdir as workdir_lib
from ultramem_jax.config import Config, require
from ultramem_jax.model import Transformer


class Trained(NamedTuple):
  """A model with the parameters of a checkpoint.

  config: of the run.
  step: of the checkpoint.
  model, variables: logits_BTV = model.apply(variables, tokens_BT).
  """

  config: Config
  step: int
  model: Transformer
  variables: dict[str, Any]


def load(workdir: str | os.PathLike | None, saved: str = "newest") -> Trained:
  """Loads a model without its optimizer.

  Args:
    workdir: the run's directory.
    saved: which checkpoint: "newest", "best" (by validation loss), or the
      number of a step.
  Raises:
    ConfigError: no workdir given, no run in it, or no such choice.
    checkpoint.CheckpointError: no such checkpoint, or a damaged one.
  """
  require(bool(workdir), "--workdir", workdir, "must name a run's directory")
  require(saved in ("newest", "best") or saved.isdecimal(), "--step", saved,
          "must be newest, best, or the number of a step")
  config = workdir_lib.load_config(workdir)
  state = jax.eval_shape(functools.partial(step.init_state, config))
  variables = {"params": state.params, "buffers": state.buffers}
  restored = checkpoint.restore(
      workdir, variables, int(saved) if saved.isdecimal() else saved
  )
  return Trained(
      config, restored.step, Transformer(config.model), restored.items
  )
