"""Training steps to time, as train.py takes them."""

import contextlib
from collections.abc import Callable
from typing import Any

from ultramem_jax import data
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.config import Config
from ultramem_jax.train import sharding
from ultramem_jax.train.program import TrainProgram, one_device
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
  layout = one_device(config)
  program = TrainProgram(config, layout)
  taken = first_batch(config, layout) if batch is None else batch
  state = program.init_state()

  def step():
    nonlocal state
    state, metrics = program(state, taken)
    return state, metrics

  return step, program.bytes_needed


def first_batch(config: Config, layout: Layout) -> Batch:
  """Returns the first batch of a run, on its devices."""
  with contextlib.closing(
    data.open(config).train(range(config.batch_size))
  ) as batches:
    return sharding.to_devices(next(batches), layout.mesh)
