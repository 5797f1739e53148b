"""Training steps to time, as train.py takes them."""

from collections.abc import Callable
from typing import Any

from ultramem_jax import data
from ultramem_jax.settings.config import Config
from ultramem_jax.train.program import TrainProgram
from ultramem_jax.train.step import Batch


def stepper(
  config: Config, batch: Batch | None = None
) -> tuple[Callable[[], Any], int]:
  """Compiles a training step on a device.

  Args:
    config: the run.
    batch: what every step takes; None: the first of the run.
  Returns:
    A function that takes a step of the run and returns all that it computes,
    and the bytes that the device holds.
  """
  program = TrainProgram(config)
  if batch is None:
    batches = data.open(config).train(range(config.batch_size))
    batch = next(batches)
    batches.close()
  state = program.init_state()

  def step():
    nonlocal state
    state, metrics = program(state, batch)
    return state, metrics

  return step, program.bytes_needed
