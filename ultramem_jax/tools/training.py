"""Runs of training: what `train.py` does, as functions.

from ultramem_jax.tools import training

training.train(parse(config_dict), workdir)
"""

import contextlib
import functools
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import logging

from ultramem_jax import data
from ultramem_jax.data import Corpus
from ultramem_jax.data.pipeline import Prefetch, TrainBatches
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.model import Transformer
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.runs import (
  checkpoint,
  distributed,
  inputs,
  origin,
  preemption,
)
from ultramem_jax.runs import log as log_lib
from ultramem_jax.runs import profile as profile_lib
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import generate
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import UserError, first_line
from ultramem_jax.tools import accounting, fit
from ultramem_jax.train import (
  compiler_options,
  guard,
  health,
  init_from,
  loop,
  optim,
  preconditions,
  rarity,
  sharding,
  skips,
  start,
)
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train.loop import Metrics
from ultramem_jax.train.program import TrainProgram
from ultramem_jax.train.state import TrainState


class Accepted(NamedTuple):
  """What may differ from how the run began: its data, some settings."""

  data: bool = False
  settings: bool = False


NOTHING = Accepted()


class Run(NamedTuple):
  """A run, and what is made for it before its first step.

  layout: of its arrays on the mesh.
  batches: of the train split, from where the run stands.
  """

  config: Config
  workdir: str
  layout: Layout
  corpus: Corpus
  batches: TrainBatches | Prefetch
  checkpointer: checkpoint.Checkpointer
  train_step: TrainProgram


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


class Opened(NamedTuple):
  """What a run reads.

  described: the line that `Corpus.describe` returns.
  files: all files, as `runs.inputs` records them.
  """

  corpus: Corpus
  described: str
  files: inputs.Inputs


def open_corpus(config: Config, workdir: str) -> Opened:
  """Opens the corpus of a run, the same on every process.

  Args:
    config: the run.
    workdir: may hold an index of the files from an earlier start.
  Raises:
    ConfigError: it cannot be opened, or differs between processes.
  """
  cache = data.IndexCache(pathlib.Path(workdir, inputs.INDEX_NAME))
  if not pathlib.Path(config.data.tokenizer).expanduser().exists():
    config = inputs.own_tokenizer(config, workdir)
  corpus = data.open(config, cache)
  described = corpus.describe()
  files = {**corpus.inputs("train", "valid"), **rarity.inputs(config)}
  same = f"{config} {described} {inputs.digest(files)}"
  distributed.require_same("config or corpus", same)
  return Opened(corpus, described, files)


def bind_workdir(
  workdir: str, config: Config, opened: Opened, accepted: Accepted
) -> None:
  """Binds a workdir to a run and to what it reads, or checks that it is.

  Args:
    workdir, config, accepted: of the run.
    opened: what it reads, of `open_corpus`.
  Raises:
    ConfigError: the workdir holds another run, or its data have changed, and
      that is not accepted.
    CheckpointError: another process is training there.
  """
  workdir_lib.require_idle(workdir)
  corpus, described, files = opened
  inputs.require_same(workdir, files, accepted.data)  # before it is written to
  workdir_lib.claim(workdir, config, described, accepted.settings)
  changes = inputs.bind(workdir, files, corpus.tokenizer_files(), accepted.data)
  if changes:
    print(changes)
  corpus.save_index()


def compile_step(
  config: Config, layout: Layout, rare: Mapping[str, np.ndarray] | None = None
) -> TrainProgram:
  """Compiles the training step; nothing is allocated but `rare`.

  Args:
    config, layout: the run.
    rare: how rare rows are, of `rarity.read`.
  Raises:
    ConfigError: the step needs more memory than there is.
  """
  compiled = TrainProgram(
    config,
    layout,
    compiler_options.for_device(
      layout.mesh.devices.flat[0], config.deterministic
    ),
    rare,
  )
  fit.check_compiled(config, compiled.bytes_needed)
  return compiled


def train(
  config: Config,
  workdir: str,
  profiled: range = range(0),
  accepted: Accepted = NOTHING,
) -> Metrics | None:
  """Trains in a workdir: fresh, or from its newest checkpoint.

  After too many skipped steps in a row it returns to that checkpoint, and
  continues with the data after them, at most `guard.rollbacks` times.

  Args, Returns and Raises: as for `train_once`.
  """
  attempt = functools.partial(train_once, config, workdir, profiled, accepted)
  data_state = None
  for left in range(config.guard.rollbacks, 0, -1):
    try:
      return attempt(data_state)
    except skips.TooManySkips as error:
      if error.is_stopping:
        logging.warning(
          "%s. Stopped: run the same command again to continue", error
        )
        return None
      data_state = error.data_state
      logging.warning("%s. Going back, %d rollbacks left", error, left - 1)
  return attempt(data_state)


def plan_start(config: Config, workdir: str) -> init_from.Plan | None:
  """Returns what a run takes from another one; None: it is new, or goes on.

  Raises:
    ConfigError: a new part could never learn, or of `init_from.plan`.
    CheckpointError: of `init_from.plan`.
  """
  if checkpoint.any_saved(workdir):
    return None
  source = init_from.plan(config) if config.init_from else None
  new = source.new if source else None
  preconditions.require_new_parts_can_learn(config, new)
  return source


def train_once(
  config: Config,
  workdir: str,
  profiled: range,
  accepted: Accepted,
  data_state: Any,
) -> Metrics | None:
  """Trains in a workdir: fresh, or from its newest checkpoint.

  Args:
    config: the run.
    workdir: the run's directory; its first run binds it to this config.
    profiled: steps to trace.
    accepted: what may differ from how the run began.
    data_state: where the data go on; None: where the checkpoint says.
  Returns:
    The validation results at the last step; None if a signal stopped the run.
  Raises:
    ConfigError: the run cannot work; raised before anything is compiled.
    TrainingError: too many steps in a row had to be skipped, or the state is
      not finite.
  """
  preconditions.require_trainable(config)
  layout = sharding.make_layout(config, mesh_lib.make(config))
  source = plan_start(config, workdir)
  rare = rarity.read(config)
  memory = fit.check(config, layout.mesh.size)
  opened = open_corpus(config, workdir)
  corpus, described, _ = opened
  rows = sharding.process_rows(config, layout.mesh)
  with contextlib.ExitStack() as stack:
    batches = stack.enter_context(contextlib.closing(corpus.train(rows)))
    bind_workdir(workdir, config, opened, accepted)
    announce(config, layout, memory, described, workdir)
    if source:
      origin.copy(source.workdir, workdir)
      print(init_from.describe(source), flush=True)
    checkpointer = stack.enter_context(
      checkpoint.Checkpointer(workdir, config.checkpoint.keep)
    )
    # Another start may have bound it before this one locked it.
    workdir_lib.claim(workdir, config, described)
    print("compiling; a later start finds the programs in a cache", flush=True)
    train_step = compile_step(config, layout, rare)
    run = Run(
      config, workdir, layout, corpus, batches, checkpointer, train_step
    )
    state, restored = start.restore_or_init(
      checkpointer,
      train_step,
      batches,
      data_state,
      source,
      layout,
      workdir_lib.is_overridden(workdir, "optim.trainable"),
    )
    checkpointer.freeze(state.frozen)
    state, results = run_to_end(run, state, restored, profiled)
  tell_end(run, state, results)
  return results


def tell_end(run: Run, state: TrainState, results: Metrics | None) -> None:
  """Prints a sample of a finished run, or how to continue a stopped one."""
  if results is None:
    print(
      f"stopped at step {int(state.step)}; run the same command again to "
      "continue"
    )
  else:
    try_sample(run.config, state, run.corpus, run.layout)


def run_to_end(
  run: Run,
  state: TrainState,
  restored: checkpoint.Restored | None,
  profiled: range,
) -> tuple[TrainState, Metrics | None]:
  """Trains from a state on, until the last step or a signal; saves it.

  Args:
    run: what was made for it.
    state: to begin with.
    restored: the checkpoint that it is from; None: it is fresh.
    profiled: steps to trace.
  Returns, Raises: as `loop.run_steps`.
  """
  config, workdir, layout, corpus, batches, checkpointer, train_step = run
  # Compiled before signals are caught: one that ends the process now loses
  # nothing.
  report_usage = health.reporter(config, state, layout)
  evaluate = loss_lib.on_validation_split(
    config, corpus, layout, state.variables()
  )
  are_finite = jax.jit(guard.are_finite).lower(state).compile()
  since = workdir_lib.overridden_at(workdir)
  with (
    log_lib.RunLog(workdir, config, restored, since) as log,
    profile_lib.Profile(workdir, profiled) as profile,
    preemption.Preemption() as stop,
  ):
    feed = loop.Feed(batches, layout.mesh, stop)
    validate = loop.interruptible(evaluate, stop)
    save = loop.saver(config, workdir, checkpointer, feed, are_finite)
    skipped = skips.Skips(config, workdir, feed, log, corpus.tokenizer.decode)
    results = loop.catch_up(
      config, state, restored, validate, checkpointer, log
    )

    def take_step(n, state):
      return profile.step(n, lambda state: train_step(state, feed(n)), state)

    if int(state.step) < config.steps:
      try:
        state, results = loop.run_steps(
          config,
          state,
          take_step,
          skipped.check,
          report_usage,
          validate,
          save,
          log,
          stop,
        )
      except skips.TooManySkips as error:
        error.is_stopping = stop.requested()
        raise
    checkpointer.wait()  # before a signal ends the process again
    if stop.requested():  # since the last step: there will be no sample
      results = None
  return state, results


def try_sample(
  config: Config, state: TrainState, corpus: Corpus, layout: Layout
) -> None:
  """Prints a sample, or says why there is none: the run is done and saved."""
  try:
    print_sample(config, state, corpus, layout)
  except (UserError, ValueError, MemoryError, jax.errors.JaxRuntimeError) as e:
    logging.warning("there is no sample: %s", first_line(e))


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
