"""Trains a model, or goes on with the run that the workdir holds.

  python train.py --config=configs/tiny.py [--workdir=DIR] [--config.steps=200]

On several hosts, on each of them: docs/scale-out.md.
"""

import contextlib
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from absl import flags

from ultramem_jax import cli, data
from ultramem_jax.data import Corpus
from ultramem_jax.data.pipeline import Prefetch, TrainBatches
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.model import Transformer
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.runs import checkpoint, distributed, preemption
from ultramem_jax.runs import log as log_lib
from ultramem_jax.runs import profile as profile_lib
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import generate
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import TrainingError
from ultramem_jax.tools import accounting, fit
from ultramem_jax.train import compiler_options, optim, sharding, usage
from ultramem_jax.train.program import TrainProgram
from ultramem_jax.train.state import TrainState

Metrics = dict[str, Any]

cli.define_config()
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Directory of the run; a run found there goes on. Default: runs/ and the "
  "name of the config file.",
)
PROFILE = flags.DEFINE_string(
  "profile",
  "",
  "FIRST:LAST: steps to trace, into the workdir's folder profile.",
)
cli.define_processes()


def announce(
  config: Config, layout: Layout, memory: str, described: str, workdir: str
) -> None:
  """Prints what is to be trained, on what, and where.

  Args:
    config, layout, workdir: the run.
    memory: the line that `fit.check` returns.
    described: the line that `Corpus.describe` returns.
  """
  print(f"{accounting.headline(config.model)}\n{memory}")
  if config.model.spans:
    print(optim.describe_table_update(config))
  print(
    f"{sharding.describe(config, layout)}\n{described}\nworkdir: {workdir}",
    flush=True,
  )


def compile_step(config: Config, layout: Layout) -> TrainProgram:
  """Compiles the training step; nothing is allocated.

  Raises:
    ConfigError: the step needs more memory than there is.
  """
  compiled = TrainProgram(
    config, layout, compiler_options.for_device(layout.mesh.devices.flat[0])
  )
  fit.check_compiled(config, compiled.bytes_needed)
  return compiled


def restore_or_init(
  checkpointer: checkpoint.Checkpointer,
  train_step: TrainProgram,
  batches: TrainBatches | Prefetch,
) -> tuple[TrainState, int | None]:
  """Returns the state to start from, and the step of its checkpoint.

  On restore, also rewinds `batches` to the saved position. Without a
  checkpoint the state is that before the first step, and the step None.
  """
  restored = checkpointer.restore_latest(train_step.state.to_items())
  if restored is None:
    return train_step.init_state(), None
  batches.set_state(restored.data)
  return TrainState.from_items(restored.items), restored.step


def usage_reporter(
  config: Config, state: TrainState, layout: Layout
) -> Callable[[TrainState], tuple[TrainState, Metrics]]:
  """Returns `usage.report`, jitted; it takes over the state.

  Args:
    config: the run.
    state: lies where those to come will.
    layout: of its arrays on a mesh.
  """
  return jax.jit(
    functools.partial(usage.report, config=config),
    donate_argnums=0,
    out_shardings=(sharding.of(state), sharding.replicated(layout.mesh)),
  )


def run_steps(
  config: Config,
  state: TrainState,
  take_step: Callable[[int, TrainState], tuple[TrainState, Metrics]],
  report_usage: Callable[[TrainState], tuple[TrainState, Metrics]],
  validate: Callable[[TrainState], Metrics],
  save: Callable[[int, TrainState, Metrics | None], None],
  log: log_lib.RunLog,
) -> tuple[TrainState, Metrics | None]:
  """Trains until the last step, or until a signal asks to stop.

  The devices need not wait for the log: the metrics of a step are fetched when
  the next one has been dispatched, or when a validation or a save waits anyway.

  Args:
    config: the run; uses steps, log_every, eval_every and checkpoint.every.
    state: the state to start from, before the last step.
    take_step: trains a step, of this number, on the next batch.
    report_usage: returns how the tables were used since the last report.
    validate: returns the results on the validation split.
    save: writes a checkpoint: (step, state, validation results at this step).
    log: records metrics and results.
  Returns:
    (state, results): the results at the last step; None if the run was stopped
    before it.
  Raises:
    TrainingError: the loss or the gradient norm is not finite.
  """
  results, due = None, []
  with preemption.Preemption() as stop:
    for n in range(int(state.step) + 1, config.steps + 1):
      state, values = take_step(n, state)
      record(log, due)  # of the step before, while this one runs
      last, stopping = n == config.steps, stop.requested(n)
      if n % config.log_every == 0:
        state, used = report_usage(state)
        due.append((n, {**values, **used}))
      validates = last or n % config.eval_every == 0
      scheduled = last or n % config.checkpoint.every == 0
      results = None
      if validates or scheduled or stopping:
        record(log, due)
      if validates:
        results = validate(state)
        log.record_validation(n, results)
      if scheduled or stopping:
        require_finite(jax.device_get(values), n)
        log.sync()
        save(n, state, results)
      if validates or scheduled:
        log.restart_clock(n)
      if stopping and not last:
        return state, None
  return state, results


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


def train(
  config: Config, workdir: str, profiled: range = range(0)
) -> Metrics | None:
  """Trains in a workdir: fresh, or from its newest checkpoint.

  Args:
    config: the run.
    workdir: the run's directory; its first run binds it to this config.
    profiled: steps to trace.
  Returns:
    The validation results at the last step; None if a signal stopped the run.
  Raises:
    ConfigError: the run cannot work; raised before anything is compiled.
    TrainingError: the loss or the gradient norm is not finite.
  """
  require_trainable(config)
  layout = sharding.make_layout(config, sharding.make_mesh(config))
  memory = fit.check(config, layout.mesh.size)
  corpus = data.open(config)
  described = corpus.describe()
  distributed.require_same("config or corpus", f"{config} {described}")
  evaluate = loss_lib.on_validation_split(config, corpus, layout)
  validate = lambda state: evaluate(state.variables())
  rows = sharding.process_rows(config, layout.mesh)
  with contextlib.ExitStack() as stack:
    batches = stack.enter_context(contextlib.closing(corpus.train(rows)))
    workdir_lib.claim(workdir, config, described)
    announce(config, layout, memory, described, workdir)
    checkpointer = stack.enter_context(
      checkpoint.Checkpointer(workdir, config.checkpoint.keep)
    )
    train_step = compile_step(config, layout)
    state, restored = restore_or_init(checkpointer, train_step, batches)
    log = stack.enter_context(log_lib.RunLog(workdir, config, restored))
    profile = stack.enter_context(profile_lib.Profile(workdir, profiled))

    def on_next_batch(state):
      batch = sharding.to_devices(next(batches), layout.mesh)
      return train_step(state, batch)

    def take_step(n, state):
      return profile.step(n, on_next_batch, state)

    def save(n, state, results):
      loss = results["loss"] if results else None
      checkpointer.save(n, state.to_items(), batches.get_state(), loss)

    if restored == config.steps:
      results = validate(state)
      log.note(log_lib.describe(config.steps, results))
    else:
      report_usage = usage_reporter(config, state, layout)
      state, results = run_steps(
        config, state, take_step, report_usage, validate, save, log
      )
  if results is None:
    print(f"stopped at step {int(state.step)}; the same command goes on")
  else:
    print_sample(config, state, corpus, layout)
  return results


def require_trainable(config: Config) -> None:
  """Raises ConfigError if the tables are stored in a form for serving."""
  table_dtype = config.model.memory.storage.table_dtype
  require(
    table_dtype != "int8",
    "model.memory.storage.table_dtype",
    table_dtype,
    "cannot be trained; train float32 or bfloat16 and convert the run by "
    "python -m ultramem_jax quantize",
  )


def print_sample(
  config: Config, state: TrainState, corpus: Corpus, layout: Layout
) -> None:
  """Prints how the model continues config.sample.prompt."""
  if not config.sample.num_tokens:
    return
  prompt = config.sample.prompt
  (text,) = generate.generate_text(
    Transformer(config.model, layout),
    state.variables(),
    corpus.tokenizer,
    [prompt],
    config.sample.sampling,
    config.seed,
  )
  print(f"sample:\n{prompt}{text}", flush=True)


def main() -> None:
  cli.join_processes(stops_together=True)
  config = cli.load_config()
  profiled = profile_lib.parse(PROFILE.value, config.steps)
  train(config, WORKDIR.value or f"runs/{cli.config_name()}", profiled)


if __name__ == "__main__":
  cli.run(main)
