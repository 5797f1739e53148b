"""The loop of a run: steps, validations, checkpoints, and an early stop.

A signal waits for one step and one save at most: what may take longer is given
up, and done when the run goes on.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ultramem_jax.runs import checkpoint, preemption
from ultramem_jax.runs import log as log_lib
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import TrainingError
from ultramem_jax.train import sharding
from ultramem_jax.train.state import TrainState

Metrics = dict[str, Any]


# (number, metrics on the devices, whether they are recorded)
Step = tuple[int, Metrics, bool]


class Feed:
  """The batches of a run, on its devices.

  Args:
    batches: of `Corpus.train`.
    mesh: of the devices.
    stop: whether the run is to stop.
  Attributes:
    data_state: where the next batch begins, of those that were handed out.
    latest: the last two of these by step, this process's rows.
  """

  def __init__(
    self, batches: Any, mesh: jax.sharding.Mesh, stop: preemption.Preemption
  ):
    self._batches, self._mesh, self._stop = batches, mesh, stop
    self.data_state = batches.get_state()
    self.latest: dict[int, dict[str, np.ndarray]] = {}

  def __call__(self, n: int) -> dict[str, jax.Array]:
    """Returns the batch of step n; raises Stopped if the run is to stop."""
    with self._stop.interruptible():
      batch = next(self._batches)
    self.data_state = self._batches.get_state()
    self.latest = {k: v for k, v in self.latest.items() if k == n - 1}
    self.latest[n] = batch
    return sharding.to_devices(batch, self._mesh)


def validates(config: Config, n: int) -> bool:
  """Returns whether step n ends with a validation."""
  return n == config.steps or n % config.eval_every == 0


def run_steps(
  config: Config,
  state: TrainState,
  take_step: Callable[[int, TrainState], tuple[TrainState, Metrics]],
  check: Callable[[int, Metrics], None],
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
    check: raises TrainingError if this step, of these metrics, was skipped, and
      is the last of `guard.max_skips` skipped in a row.
    report_usage: returns how the tables were used since the last report.
    validate: returns the results on the validation split; None: not all of it
      was seen, because the run is to stop.
    save: writes a checkpoint: (step, state, validation results at this step).
    log: records metrics and results.
    stop: whether the run is to stop.
  Returns:
    (state, results): the results at the last step; None if the run was stopped.
  Raises:
    TrainingError: of `check`.
  """
  results, due = None, []
  saved = int(state.step)

  def keep(n, state, results):
    """Saves step n, once all that belongs before it is on the disk."""
    settle(due, check, log)
    log.sync()
    save(n, state, results)

  for n in range(saved + 1, config.steps + 1):
    try:
      state, values = take_step(n, state)
    except preemption.Stopped:
      if n - 1 > saved:
        keep(n - 1, state, results)
      return state, None
    settle(due, check, log)  # of the step before, while this one runs
    is_recorded = n % config.log_every == 0
    if is_recorded:
      state, used = report_usage(state)
      values = {**values, **used}
    due.append((n, values, is_recorded))
    results = None
    if validates(config, n):
      settle(due, check, log)
      results = validate(state)
      if results:
        log.record_validation(n, results)
    stopping = stop.requested()
    scheduled = n == config.steps or n % config.checkpoint.every == 0
    if scheduled or stopping:
      keep(n, state, results)
      saved = n
    if scheduled or results:
      log.restart_clock(n)
    if stopping:
      return state, None
  return state, results


def settle(
  due: list[Step], check: Callable[[int, Metrics], None], log: log_lib.RunLog
) -> None:
  """Checks and records the steps that are due, and empties the list.

  Args:
    due: steps that were dispatched.
    check, log: as in `run_steps`.
  Raises:
    TrainingError: of `check`.
  """
  for n, values, is_recorded in due:
    check(n, values)
    if is_recorded:
      log.record_step(n, jax.device_get(values))
  due.clear()


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


def interruptible(
  evaluate: Callable[..., Metrics], stop: preemption.Preemption
) -> Callable[[TrainState], Metrics | None]:
  """Returns the validation of a state; None if the run is to stop."""

  def validate(state):
    with contextlib.suppress(preemption.Stopped), stop.interruptible():
      return evaluate(state.variables(), stop.check)

  return validate


def saver(
  config: Config,
  workdir: str,
  checkpointer: checkpoint.Checkpointer,
  feed: Feed,
  are_finite: Callable[[TrainState], jax.Array],
) -> Callable[[int, TrainState, Metrics | None], None]:
  """Returns the function that saves a step, as `run_steps` takes it.

  It raises TrainingError, and saves nothing, if a number is not finite: every
  later start would go on from there.

  Args:
    config, workdir, checkpointer, feed: the run.
    are_finite: `guard.are_finite`, compiled.
  """

  def save(n, state, results):
    if not are_finite(state):
      raise TrainingError(
        f"parameters or moments of step {n} are not finite, so it was not "
        "saved; run the same command again to continue from the checkpoint "
        "before it. Try a lower optim.learning_rate"
      )
    due = not results and validates(config, n)
    loss = results["loss"] if results else None
    checkpointer.save(n, state.to_items(), feed.data_state, loss, due)
    workdir_lib.require_claimed(workdir)

  return save
