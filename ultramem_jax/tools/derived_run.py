"""Runs whose model is made from that of another run."""

import dataclasses
import os
from typing import Any

from ultramem_jax.runs import checkpoint, inputs, origin
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.runs.files import written_whole
from ultramem_jax.settings.config import Config


def write(
  output: str | os.PathLike,
  workdir: str | os.PathLike,
  config: Config,
  variables: dict[str, Any],
  step: int = 0,
  valid_loss: float | None = None,
) -> None:
  """Writes the workdir of a new run, whole or not at all.

  Args:
    output: of the new run; empty or absent.
    workdir: of the run that it comes from, whose text and tokenizer it keeps.
    config: of the new run. Its parameters are these ones, whatever `init_from`
      says.
    variables: the collections of its model.
    step: at which it stands.
    valid_loss: of the model; None: it was not evaluated.
  """
  config = dataclasses.replace(config, init_from="", init_skip="")
  with written_whole(output) as folder:
    workdir_lib.claim(folder, config, workdir_lib.load_corpus(workdir))
    inputs.copy(workdir, folder)
    origin.copy(workdir, folder)
    with checkpoint.Checkpointer(folder, keep=1) as checkpointer:
      checkpointer.save(step, variables, {}, valid_loss)
