"""The loop of a run: steps, validations, checkpoints, and an early stop.

A signal waits for one step and one save at most: what may take longer is given
up, and done when the run goes on.
"""

import math
from collections.abc import Callable
from typing import Any

import jax

from ultramem_jax.runs import checkpoint, preemption
from ultramem_jax.runs import log as log_lib
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import TrainingError
from ultramem_jax.train import sharding
from ultramem_jax.train.state import TrainState

Metrics = dict[str, Any]


class Feed:
  """The batches of a run, on its devices.

  Args:
    batches: of `Corpus.train`.
    mesh: of the devices.
    stop: whether the run is to stop.
  Attributes:
    place: where the next batch begins, of those that were handed out.
  """

  def __init__(
    self, batches: Any, mesh: jax.sharding.Mesh, stop: preemption.Preemption
  ):
    self._batches, self._mesh, self._stop = batches, mesh, stop
    self.place = batches.get_state()

  def __call__(self) -> dict[str, jax.Array]:
    """Returns the next batch; raises Stopped if the run is to stop."""
    with self._stop.interruptible():
      batch = next(self._batches)
    self.place = self._batches.get_state()
    return sharding.to_devices(batch, self._mesh)


def validates(config: Config, n: int) -> bool:
  """Whether step n ends with a validation."""
  return n == config.steps or n % config.eval_every == 0


def run_steps(
  config: Config,
  state: TrainState,
  take_step: Callable[[int, TrainState], tuple[TrainState, Metrics]],
  report_usage: Callable[[TrainState], tuple[TrainState, Metrics]],
  validate: Callable[[TrainState], Metrics | None],
  save: Callable[[int, TrainState, Metrics | None], None],
  log: log_lib.RunLog,
  stop: preemption.Preemption,
) -> tuple[TrainState, Metrics | None]:
  """Trains until the last step, or until a signal asks to stop.

  The devices need not wait for the log: the metrics of a step are fetched when
  the next one has been dispatched, or when a validation or a save waits anyway.

  Args:
    config: the run; uses steps, log_every, eval_every and checkpoint.every.
    state: the state to start from, before the last step.
    take_step: trains a step, of this number, on the next batch. Raises Stopped,
      before it takes over the state, if the run is to stop.
    report_usage: returns how the tables were used since the last report.
    validate: returns the results on the validation split; None: not all of it
      was seen, because the run is to stop.
    save: writes a checkpoint: (step, state, validation results at this step).
    log: records metrics and results.
    stop: whether the run is to stop.
  Returns:
    (state, results): the results at the last step; None if the run was stopped.
  Raises:
    TrainingError: the loss or the gradient norm is not finite.
  """
  values, results, due = {}, None, []
  saved = int(state.step)
  for n in range(saved + 1, config.steps + 1):
    try:
      state, values = take_step(n, state)
    except preemption.Stopped:
      if n - 1 > saved:
        keep(n - 1, state, values, results, due, save, log)
      return state, None
    record(log, due)  # of the step before, while this one runs
    if n % config.log_every == 0:
      state, used = report_usage(state)
      due.append((n, {**values, **used}))
    results = None
    if validates(config, n):
      record(log, due)
      results = validate(state)
      if results:
        log.record_validation(n, results)
    stopping = stop.requested()
    scheduled = n == config.steps or n % config.checkpoint.every == 0
    if scheduled or stopping:
      keep(n, state, values, results, due, save, log)
      saved = n
    if scheduled or results:
      log.restart_clock(n)
    if stopping:
      return state, None
  return state, results


def keep(
  n: int,
  state: TrainState,
  values: Metrics,
  results: Metrics | None,
  due: list[tuple[int, Metrics]],
  save: Callable[[int, TrainState, Metrics | None], None],
  log: log_lib.RunLog,
) -> None:
  """Saves step n, once all that belongs before it is on the disk.

  Args:
    values: the metrics of the step, on the devices.
    results: of its validation; None if there was none.
    n, state, due, save, log: as in `run_steps`.
  Raises:
    TrainingError: the loss or the gradient norm is not finite.
  """
  record(log, due)
  require_finite(jax.device_get(values), n)
  log.sync()
  save(n, state, results)


def record(log: log_lib.RunLog, due: list[tuple[int, Metrics]]) -> None:
  """Fetches and records the metrics that are due, and empties the list.

  Args:
    log: records them.
    due: (step, metrics on the devices).
  Raises:
    TrainingError: the loss or the gradient norm is not finite.
  """
  for n, values in due:
    values = jax.device_get(values)
    require_finite(values, n)
    log.record_step(n, values)
  due.clear()


def require_finite(values: Metrics, n: int) -> None:
  """Raises TrainingError if the loss or the gradient norm is not finite.

  The gradient may overflow although the loss is finite. The parameters after
  such a step are not finite, and no run could go on from their checkpoint.

  Args:
    values: metrics with "loss" and "gradient_norm".
    n: the step they belong to.
  """
  for name in ("loss", "gradient_norm"):
    if not math.isfinite(values[name]):
      raise TrainingError(
        f"the {name.replace('_', ' ')} of step {n} is {values[name]}; nothing "
        "was saved since the last checkpoint. Try a lower optim.learning_rate"
      )


def catch_up(
  config: Config,
  state: TrainState,
  restored: checkpoint.Restored | None,
  validate: Callable[[TrainState], Metrics | None],
  checkpointer: checkpoint.Checkpointer,
  log: log_lib.RunLog,
) -> Metrics | None:
  """Validates the restored step, if a signal had stopped its validation.

  Does so too if it is the last step, for whoever runs the command again.

  Args:
    restored: the checkpoint of the state.
    config, state, validate, log: as in `run_steps`.
    checkpointer: keeps the results.
  Returns:
    The results; None: there are none, or the run is to stop.
  """
  if restored is None:
    return None
  if restored.validation_due:
    results = validate(state)
    if results:
      log.record_validation(restored.step, results)
      log.sync()
      checkpointer.add_loss(restored.step, results["loss"])
    return results
  if restored.step < config.steps:
    return None
  results = validate(state)
  if results:
    log.note(log_lib.describe(config.steps, results))
  return results
