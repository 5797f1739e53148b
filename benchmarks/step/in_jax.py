"""Our side of benchmarks.step, a process like that of the peers."""

import functools
import math
from collections.abc import Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import configs, trace, train_steps, worker
from benchmarks.step import cases
from ultramem_jax.runs import compilation_cache
from ultramem_jax.settings.config import Config
from ultramem_jax.train import step as step_lib
from ultramem_jax.train.state import TrainState


def make_batch(config: Config) -> step_lib.Batch:
  """Returns a batch of text, each row one document."""
  shape = config.batch_size, config.data.seq_len
  text = np.frombuffer(cases.text(math.prod(shape) + 1), np.uint8)
  return {
    "tokens": jnp.asarray(text[:-1].reshape(shape), jnp.int32),
    "targets": jnp.asarray(text[1:].reshape(shape), jnp.int32),
    "weights": jnp.ones(shape, jnp.float32),
    "segments": jnp.ones(shape, jnp.int32),
    "positions": jnp.tile(jnp.arange(shape[1], dtype=jnp.int32), (shape[0], 1)),
  }


def step(model: Sequence[Any]) -> worker.Run:
  """Returns a training step of train.py.

  Args:
    model: the name of a config, and overrides.
  """
  config = configs.load(*model)
  take_step, _ = train_steps.stepper(config, make_batch(config))
  return lambda: jax.block_until_ready(take_step())


def quiet_model_step(
  model_step: Any, state: TrainState, *others: Any, **options: Any
) -> Any:
  """`step.model_step` without what is only watched, which XLA then drops."""
  after, gradients, metrics = model_step(state, *others, **options)
  quiet = after.replace(usage=state.usage)
  return quiet, gradients, {"loss": metrics["loss"]}


def quiet_step(model: Sequence[Any]) -> worker.Run:
  """Returns `step` without metrics but the loss, and without usage counts."""
  quiet = functools.partial(quiet_model_step, step_lib.model_step)
  with mock.patch.object(step_lib, "model_step", quiet):
    return step(model)


def matmul(size: int) -> worker.Run:
  x = jnp.ones((size, size))
  multiply = jax.jit(lambda x: x @ x)
  return lambda: jax.block_until_ready(multiply(x))


MAKERS = {"step": step, "step without monitors": quiet_step, "matmul": matmul}

if __name__ == "__main__":
  compilation_cache.use()  # a process for each turn compiles only once
  worker.serve(MAKERS, trace=trace.measure)
