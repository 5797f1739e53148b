"""The training step and the evaluation step: pure functions of a state.

A training step has two parts, so that tables may be written in place
(`program.TrainProgram` compiles and runs them):

  state, gradients, metrics = model_step(state, batch)      reads the tables
  tables = table_step(state.tables, gradients)              writes them
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from ultramem_jax.layers.buffers import refresh_buffers
from ultramem_jax.model import Transformer
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.config import Config
from ultramem_jax.train import guard, optim, trainable, usage
from ultramem_jax.train import losses as losses_lib
from ultramem_jax.train import tables as tables_lib
from ultramem_jax.train.losses import Batch
from ultramem_jax.train.state import TrainState
from ultramem_jax.train.tables import TableGradients, Tables


def abstract_batch(config: Config) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes and dtypes of a training batch, each entry [B, T]."""
  shape = (config.batch_size, config.data.seq_len)
  dtypes = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "weights": jnp.float32,
    "segments": jnp.int32,
    "positions": jnp.int32,
  }
  return {k: jax.ShapeDtypeStruct(shape, v) for k, v in dtypes.items()}


def loss_fn(
  variables: dict[str, Any],
  batch: Batch,
  key: jax.Array,
  total_weight: jax.Array,
  *,
  config: Config,
  layout: Layout | None = None,
  collections: Sequence[str] = (),
) -> tuple[jax.Array, dict[str, Any]]:
  """Returns the training loss of a batch, or of a part of one.

  Args:
    variables: the model's collections.
    batch: of `abstract_batch`, or some of its rows.
    key: PRNG key of the dropout.
    total_weight: sum of the weights of the whole batch, so that the losses
      (and gradients) of its parts add up to those of the whole.
    config: the run's.
    layout: of the arrays on a mesh; None: one device.
    collections: others of the model that are wanted, such as
      `tables.TABLE_COLLECTIONS`.
  Returns:
    (loss, aux): aux has "losses", the `losses.terms` of the loss by name;
    "stats", monitoring scalars by "module/name"; "slots" and "cells", by
    memory, the virtual rows and the cells of its grid that it read,
    [B, T, A, M]; and the collections asked for.
  """
  sown: Any
  logits_BTV, sown = Transformer(config.model, layout).apply(
    variables,
    batch["tokens"],
    batch["segments"],
    batch["positions"],
    deterministic=False,
    rngs={"dropout": key},
    mutable=["losses", "stats", "intermediates", *collections],
  )
  teacher_BTV = None
  if config.optim.distillation:
    teacher_BTV = losses_lib.backbone_logits(
      variables["params"], batch, config, layout
    )
  losses = losses_lib.terms(
    logits_BTV, teacher_BTV, sown, batch, total_weight, config
  )
  stats: dict[str, Any] = traverse_util.flatten_dict(
    sown.get("stats", {}), sep="/"
  )
  return losses_lib.total_loss(losses, config), {
    "losses": losses,
    "stats": {name: value for name, (value,) in stats.items()},
    "slots": _sown_by_memories(sown, "slot_BTAM"),
    "cells": _sown_by_memories(sown, "cell_BTAM"),
    **{name: sown[name] for name in collections},
  }


def _sown_by_memories(sown, name: str) -> dict[str, jax.Array]:
  intermediates = sown.get("intermediates", {})
  return {memory: values[name][0] for memory, values in intermediates.items()}


def _microbatch_gradients(
  state: TrainState, buffers, batch, key, total_weight, config, layout
):
  """Returns (gradients, factors, aux) of a microbatch.

  Where the update of tables is dense there are no factors, and the gradients
  hold those of the tables. Frozen parameters are constants: the backward ends
  below the lowest layer that is trained.
  """
  variables = {"params": state.params, "buffers": buffers}
  tables = state.tables

  def loss(variables, *args, **options):
    params = trainable.join(variables["params"], state.frozen)
    return loss_fn(
      {**variables, "params": params},
      *args,
      config=config,
      layout=layout,
      **options,
    )

  if optim.updates_rows(config):
    (_, aux), gradients, factors = tables_lib.sparse_value_and_grad(
      functools.partial(loss, collections=tables_lib.TABLE_COLLECTIONS)
    )(variables, tables, batch, key, total_weight, segment_BT=batch["segments"])
    return gradients, factors, aux
  gradients, aux = jax.grad(
    lambda params: loss(
      {**variables, "params": params}, batch, key, total_weight
    ),
    has_aux=True,
  )(tables_lib.join_tables(variables["params"], tables))
  return gradients, {}, aux


def _gradients(
  state: TrainState, buffers, batch: Batch, config: Config, layout
):
  """Returns (gradients, factors, aux) of all microbatches of a batch."""
  count = config.accumulation_steps
  total_weight = jnp.maximum(batch["weights"].sum(), 1.0)
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

  def microbatch(index, batch):
    return _microbatch_gradients(
      state,
      buffers,
      batch,
      jax.random.fold_in(key, index),
      total_weight,
      config,
      layout,
    )

  if count == 1:
    return microbatch(0, batch)

  def accumulate(sums, inputs):
    gradients, factors, aux = microbatch(*inputs)
    stats = jax.tree.map(lambda x: x / count, aux["stats"])
    sums = jax.tree.map(jnp.add, sums, (gradients, aux["losses"], stats))
    return sums, (factors, aux["slots"], aux["cells"])

  batches = _microbatches(batch, count)
  gradients, _, aux = jax.eval_shape(
    microbatch, 0, jax.tree.map(lambda x: x[0], batches)
  )
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    (gradients, aux["losses"], aux["stats"]),
  )
  (gradients, losses, stats), (factors, *reads) = jax.lax.scan(
    accumulate, zeros, (jnp.arange(count), batches)
  )
  reads = jax.tree.map(lambda x: x.swapaxes(0, 1), reads)
  factors, (slots, cells) = tables_lib.merge_leading((factors, reads))
  aux = {"losses": losses, "stats": stats, "slots": slots, "cells": cells}
  return gradients, factors, aux


def _sparse_gradients(
  gradients, factors, tables: Tables, rarity, config: Config, layout
):
  """Returns (factors, reads, norm), where only rows are updated."""
  factors = layout_lib.constrain_whole(factors, layout)
  if config.optim.chooses_rows:
    factors = tables_lib.choose_rows(
      factors, rarity or {}, config.optim.table_top_t, config.optim.table_rows
    )
  reads = tables_lib.sorted_reads(factors, tables, layout)
  norm = tables_lib.global_norm(gradients, factors, tables, reads, layout)
  return factors, reads, norm


def model_step(
  state: TrainState,
  batch: Batch,
  rarity: Mapping[str, jax.Array] | None = None,
  *,
  config: Config,
  layout: Layout | None = None,
) -> tuple[TrainState, TableGradients, dict[str, jax.Array]]:
  """Updates all but the tables, and returns the gradients of the tables.

  Args:
    state: before the step.
    batch: of `abstract_batch`; its rows are cut into
      config.accumulation_steps microbatches.
    rarity: of the rows of each table, where only some are updated
      (`optim.table_rows`): `rarity.read`.
    config: static.
    layout: of the arrays on a mesh; None: one device. Static.
  Returns:
    (state, gradients, metrics): the state with its tables as they were, which
    `table_step` updates by the gradients; float32 scalars by name.
  """
  # The vectors of a frozen core stay: they may belong to the core before its
  # last update.
  buffers = refresh_buffers(state.params, state.buffers)
  gradients, table_gradients, aux = _gradients(
    state, buffers, batch, config, layout
  )
  if optim.updates_rows(config):
    table_gradients, reads, norm = _sparse_gradients(
      gradients, table_gradients, state.tables, rarity, config, layout
    )
  else:
    norm, reads = optax.tree.norm(gradients), {}
    gradients, table_gradients = tables_lib.split_tables(gradients)
  step = state.step + 1
  loss = losses_lib.total_loss(aux["losses"], config)
  is_taken, judged = guard.judge(state.guard, step, loss, norm, config.guard)
  params, opt_state = _update_params(state, gradients, norm, is_taken, config)
  # Counted after the backward: a TPU runs few collectives beside its matmuls,
  # and those of the look-ups matter more.
  (slots, cells), _ = jax.lax.optimization_barrier(
    ((aux["slots"], aux["cells"]), norm)
  )
  is_read_BT = (batch["segments"] > 0) & is_taken
  state = state.replace(
    step=step,
    params=params,
    buffers=buffers,
    usage=usage.count(state.usage, slots, cells, is_read_BT, layout),
    opt_state=opt_state,
    guard=judged,
  )
  reads = guard.keep_reads(is_taken, reads, state.tables)
  scale = optim.clip_factor(config.optim, norm)
  table_gradients = TableGradients(
    table_gradients, reads, scale, step, is_taken
  )
  return state, table_gradients, _metrics(state, aux, norm, config)


def _update_params(
  state: TrainState, gradients, norm, is_taken, config: Config
):
  """Returns (params, opt_state) after a step, or as they were."""
  optimizer = optim.make_optimizer(config.optim, config.steps)
  updates, opt_state = optimizer.update(
    gradients, state.opt_state, state.params, norm=norm, is_taken=is_taken
  )
  params = optax.apply_updates(state.params, updates)
  return guard.keep(is_taken, params, state.params), opt_state


def _metrics(state: TrainState, aux, norm, config: Config):
  """Returns what `model_step` reports about the step that led to a state."""
  schedules = {"learning_rate": optim.base_schedule}
  if state.tables:
    schedules["value_learning_rate"] = optim.value_schedule
  rates = {
    name: schedule(config.optim, config.steps)(state.step)
    for name, schedule in schedules.items()
  }
  return {
    **aux["losses"],
    "gradient_norm": norm,
    **rates,
    "skipped_steps": state.guard.skipped.astype(jnp.float32),
    "skips_in_a_row": state.guard.in_a_row.astype(jnp.float32),
    **aux["stats"],
  }


def table_step(
  tables: Tables,
  gradients: TableGradients,
  *,
  config: Config,
  layout: Layout | None = None,
) -> Tables:
  """Updates the tables, the part of a step that `model_step` leaves.

  Args:
    tables: by path, before the step.
    gradients: of `model_step`.
    config, layout: static.
  Returns:
    The tables after the step.
  """
  if not optim.updates_rows(config):
    return optim.update_all_rows(tables, gradients, config.optim, config.steps)
  return tables_lib.update_tables(
    tables,
    gradients.by_path,
    optim.table_rule(config.optim, config.steps, gradients.step),
    gradients.scale,
    config.seed,
    gradients.reads,
    layout,
  )


def eval_step(
  variables: Any, batch: Batch, *, config: Config, layout: Layout | None = None
) -> dict[str, jax.Array]:
  """Returns sums over a batch: "loss" in nats, "tokens", "bytes" of text.

  It is taken in config.accumulation_steps microbatches, as in training.
  """

  def microbatch(batch):
    logits_BTV: Any = Transformer(config.model, layout).apply(
      variables, batch["tokens"], batch["segments"], batch["positions"]
    )
    loss_BT, _ = losses_lib.token_losses(logits_BTV, batch["targets"])
    return {
      "loss": (loss_BT * batch["weights"]).sum(),
      "tokens": batch["weights"].sum(),
      "bytes": batch["bytes"].sum(),
    }

  if config.accumulation_steps == 1:
    return microbatch(batch)
  sums = jax.lax.map(
    microbatch, _microbatches(batch, config.accumulation_steps)
  )
  return {name: x.sum() for name, x in sums.items()}


def _microbatches(batch: Batch, count: int) -> Batch:
  """Returns a batch cut into microbatches, [count, B / count, T].

  Microbatch i takes the rows i, i + count, ..., so that every device finds its
  share of each among its own rows.
  """
  return jax.tree.map(
    lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch
  )


def jitted(
  function: Callable[..., Any],
  config: Config,
  layout: Layout | None = None,
  **options: Any,
) -> Any:
  """Returns jax.jit of a function, with config and layout bound.

  Args:
    function: takes arrays by position, config and layout by name.
    config: the run.
    layout: of the arrays on a mesh; None: one device.
    **options: of jax.jit.
  """
  bound = functools.partial(function, config=config, layout=layout)
  return jax.jit(bound, **options)
