"""Trains a model, or goes on with the run that the workdir holds.

  python train.py --config=configs/tiny.py [--workdir=DIR] [--config.steps=200]

On several hosts, on each of them: docs/scale-out.md.
"""

import contextlib
import functools
import math
import time

import jax
from absl import flags

from ultramem_jax import cli, data
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.model import Transformer
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.runs import checkpoint, distributed, preemption
from ultramem_jax.runs import metrics as metrics_lib
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import generate
from ultramem_jax.settings import errors
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config
from ultramem_jax.tools import accounting, fit
from ultramem_jax.train import compiler_options, optim, sharding, usage
from ultramem_jax.train.program import TrainProgram
from ultramem_jax.train.state import TrainState

cli.define_config()
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Directory of the run; a run found there goes on. Default: runs/ and the "
  "name of the config file.",
)
cli.define_processes()


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
  checkpointer, run_step: TrainProgram, batches
) -> tuple[TrainState, int | None]:
  """Returns the state to start from, and the step of its checkpoint.

  On restore, also rewinds `batches` to the saved position. Without a
  checkpoint the state is that before the first step, and the step None.
  """
  restored = checkpointer.restore_latest(run_step.state.to_items())
  if restored is None:
    return run_step.init_state(), None
  batches.set_state(restored.data)
  return TrainState.from_items(restored.items), restored.step


def run_steps(state, batches, layout, config, run_step, validate, save, logs):
  """Steps until the last one, or until a signal asks to stop.

  Returns:
    (state, evaluation): the validation of the last step, None if the run was
    stopped before it.
  """
  writer, progress = logs
  report_usage = jax.jit(
    functools.partial(usage.report, config=config),
    donate_argnums=0,
    out_shardings=(sharding.of(state), sharding.replicated(layout.mesh)),
  )
  tokens = config.batch_size * config.data.seq_len
  start, began = int(state.step), time.monotonic()
  with preemption.Preemption() as stop:
    for n in range(start + 1, config.steps + 1):
      batch = sharding.to_devices(next(batches), layout.mesh)
      state, values = run_step(state, batch)
      stopping = stop.requested(n)
      if n % config.log_every == 0:
        state, used = report_usage(state)
        values = jax.device_get({**values, **used})
        require_finite(values, n)
        seconds = time.monotonic() - began
        speed = (n - start) * tokens / seconds
        writer.write(n, values)
        writer.write_timing(
          n, {"tokens_per_second": speed, "step_seconds": tokens / speed}
        )
        progress.update(n, values["loss"], speed)
        start, began = n, time.monotonic()
      evaluation = None
      validating = n % config.eval_every == 0 or n == config.steps
      saving = n % config.checkpoint.every == 0 or n == config.steps or stopping
      if validating:
        evaluation = validate(state)
        writer.write(n, {f"valid/{k}": v for k, v in evaluation.items()})
        progress.note(describe(n, evaluation))
      if saving:
        require_finite(jax.device_get(values), n)
        writer.sync()
        save(n, state, evaluation)
      if evaluation or n % config.checkpoint.every == 0:
        start, began = n, time.monotonic()
      if stopping and n < config.steps:
        return state, None
  return state, evaluation


def require_finite(values: dict[str, float], n: int) -> None:
  """Raises errors.TrainingError if loss or gradient of step n is no number.

  The gradient too, as it may overflow under a finite loss: parameters that
  are no numbers would otherwise be saved, and no run could go on from them.
  """
  for name in ("loss", "gradient_norm"):
    if not math.isfinite(values[name]):
      raise errors.TrainingError(
        f"the {name} of step {n} is {values[name]}; nothing was saved since "
        "the last checkpoint. Try a lower optim.learning_rate"
      )


def describe(n: int, evaluation: dict[str, float]) -> str:
  """A line with the results of a validation."""
  return (
    f"step {n}: validation loss {evaluation['loss']:.4f}, perplexity "
    f"{evaluation['perplexity']:.3f}, {evaluation['bits_per_byte']:.4f} bits "
    "per byte"
  )


def train(config: Config, workdir: str) -> dict[str, float] | None:
  """Trains in a workdir: fresh, or from its newest checkpoint.

  Args:
    config: the run.
    workdir: bound to this config by its first run.
  Returns:
    The validation results at the last step; None if stopped by a signal.
  Raises:
    ConfigError: before anything is compiled, if the run cannot work.
    errors.TrainingError: the loss is not a number.
  """
  table_dtype = config.model.memory.storage.table_dtype
  require(
    table_dtype != "int8",
    "model.memory.storage.table_dtype",
    table_dtype,
    "cannot be trained; train float32 or bfloat16 and convert the run by "
    "python -m ultramem_jax quantize",
  )
  mesh = sharding.make_mesh(config)
  layout = sharding.make_layout(config, mesh)
  memory = fit.check(config, mesh.size)
  corpus = data.open(config)
  described = corpus.describe()
  print(f"{accounting.headline(config.model)}\n{memory}")
  if config.model.spans:
    print(optim.describe_table_update(config))
  print(
    f"{sharding.describe(config, layout)}\n{described}\nworkdir: {workdir}",
    flush=True,
  )
  distributed.require_same("config or corpus", f"{config} {described}")
  evaluate_params = loss_lib.on_validation_split(config, corpus, layout)

  def validate(state):
    variables = state.variables()
    return evaluate_params(variables["params"], variables["buffers"])

  rows = sharding.process_rows(config, mesh)
  with contextlib.ExitStack() as stack:
    batches = stack.enter_context(contextlib.closing(corpus.train(rows)))
    workdir_lib.claim(workdir, config, described)
    checkpointer = stack.enter_context(
      checkpoint.Checkpointer(workdir, config.checkpoint.keep)
    )
    run_step = compile_step(config, layout)
    state, restored = restore_or_init(checkpointer, run_step, batches)
    writer = stack.enter_context(
      contextlib.closing(metrics_lib.Writer(workdir, restored))
    )
    progress = stack.enter_context(
      contextlib.closing(metrics_lib.Progress(int(state.step), config.steps))
    )
    if restored is not None:
      progress.note(f"going on from the checkpoint of step {restored}")

    def save(n, state, evaluation):
      loss = evaluation["loss"] if evaluation else None
      checkpointer.save(n, state.to_items(), batches.get_state(), loss)

    if int(state.step) == config.steps:
      evaluation = validate(state)
      progress.note(describe(config.steps, evaluation))
    else:
      state, evaluation = run_steps(
        state,
        batches,
        layout,
        config,
        run_step,
        validate,
        save,
        (writer, progress),
      )
  if evaluation is None:
    print(f"stopped at step {int(state.step)}; the same command goes on")
  else:
    print_sample(config, state, corpus, layout)
  return evaluation


def print_sample(config: Config, state, corpus, layout) -> None:
  """Prints what the model makes of config.sample.prompt."""
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
  train(config, WORKDIR.value or f"runs/{cli.config_name()}")


if __name__ == "__main__":
  cli.run(main)
