"""Our side of benchmarks.pretrained: greedy continuations, to be timed."""

import time
from typing import Any

import jax
import numpy as np

from benchmarks.harness import worker
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


if __name__ == "__main__":
  worker.serve({"greedy": Greedy}, first=lambda run, _: run.first_seconds)
