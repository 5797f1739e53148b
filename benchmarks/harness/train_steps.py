"""Training steps to time, as train.py takes them."""

from collections.abc import Callable
from typing import Any

from ultramem_jax import data
from ultramem_jax.settings.config import Config
from ultramem_jax.train.program import TrainProgram


def stepper(config: Config) -> tuple[Callable[[], Any], int]:
  """Compiles a training step on a device.

  Args:
    config: the run; every step takes its first batch.
  Returns:
    A function that takes a step of the run and returns all that it computes,
    and the bytes that the device holds.
  """
  program = TrainProgram(config)
  batches = data.open(config).train(range(config.batch_size))
  batch = next(batches)
  batches.close()
  state = program.init_state()

  def step():
    nonlocal state
    state, metrics = program(state, batch)
    return state, metrics

  return step, program.bytes_needed
