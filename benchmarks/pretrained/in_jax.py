"""Our side of benchmarks.pretrained: what is timed, in its own process."""

import pathlib
import tempfile
import time
from typing import Any

import jax
import numpy as np

from benchmarks.harness import memory, train_steps, worker
from benchmarks.pretrained import model
from ultramem_jax.runs import checkpoint
from ultramem_jax.serve import generate
from ultramem_jax.serve import load as load_lib
from ultramem_jax.serve import prepare as prepare_lib
from ultramem_jax.settings.sampling import Sampling


class Greedy:
  """Continues prompts; the first call compiles.

  first_seconds: of that call.
  """

  def __init__(self, argument: Any):
    """Takes {"workdir", "prompts": token ids of each, "tokens": new ones}."""
    loaded = load_lib.load(argument["workdir"])
    self._model = prepare_lib.prepare(loaded.model, loaded.variables)
    self._prompts = [np.array(x, np.int32) for x in argument["prompts"]]
    self._sampling = Sampling(argument["tokens"], temperature=0.0)
    self.first_seconds = 0.0

  def __call__(self) -> list[list[int]]:
    began = time.perf_counter()
    made = generate.generate(
      *self._model, self._prompts, self._sampling, jax.random.key(0)
    )
    self.first_seconds = self.first_seconds or time.perf_counter() - began
    return [x.tolist() for x in made]


class Step:
  """A training step of the model with a memory: {"workdir", "optim"}."""

  def __init__(self, argument: Any):
    self._config = model.with_memory(argument["workdir"], argument["optim"])
    self._step, _ = train_steps.stepper(self._config)
    self._state: Any = None

  def __call__(self) -> None:
    self._state, _ = jax.block_until_ready(self._step())

  def peak(self) -> int:
    """Returns the most resident memory in a step, in bytes."""
    memory.forget_peak()
    self()
    return memory.peak_bytes()

  def saved(self) -> dict[str, int]:
    """Returns the bytes of a checkpoint, and of what lies beside them all."""
    with tempfile.TemporaryDirectory() as folder:
      with checkpoint.Checkpointer(folder, keep=1) as saver:
        saver.freeze(self._state.frozen)
        saver.save(1, self._state.to_items(), {})
      return {
        name: sum(x.stat().st_size for x in place.rglob("*") if x.is_file())
        for name in ("checkpoints", "frozen")
        for place in [pathlib.Path(folder, name)]
      }


if __name__ == "__main__":
  worker.serve(
    {"greedy": Greedy, "step": Step},
    first=lambda run, _: run.first_seconds,
    peak=lambda run, _: run.peak(),
    saved=lambda run, _: run.saved(),
  )
