"""The training step and the evaluation step: pure functions of a state."""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from ultramem_jax.layers.tables import Behind
from ultramem_jax.layers.ultramem import refresh_buffers
from ultramem_jax.model import Transformer
from ultramem_jax.ops.catch_up import all_rows
from ultramem_jax.ops.row_update import Table
from ultramem_jax.ops.sharded import layout as layout_lib
from ultramem_jax.ops.sharded import lookup as sharded_lookup
from ultramem_jax.ops.sharded import row_update as sharded_update
from ultramem_jax.ops.sharded.layout import Layout
from ultramem_jax.settings.config import Config
from ultramem_jax.train import optim
from ultramem_jax.train import tables as tables_lib
from ultramem_jax.train.state import TrainState, values_of

Batch = dict[str, jax.Array]


def abstract_batch(config: Config) -> Batch:
  """Shapes and dtypes of a training batch, each entry [B, T]."""
  shape = (config.batch_size, config.data.seq_len)
  dtypes = {
    "tokens": jnp.int32,
    "targets": jnp.int32,
    "weights": jnp.float32,
    "segments": jnp.int32,
    "positions": jnp.int32,
  }
  return {k: jax.ShapeDtypeStruct(shape, v) for k, v in dtypes.items()}


def token_losses(logits_BTV, targets_BT):
  """Cross entropy of each target, and log Z, both [B, T] float32, in nats."""
  log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  target_BT = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
  return log_z_BT - target_BT[..., 0], log_z_BT


def loss_fn(
  params,
  buffers,
  batch: Batch,
  key,
  total_weight,
  config: Config,
  layout: Layout | None = None,
  taps=None,
  behind=None,
):
  """Training loss of a batch, or of a part of one.

  Args:
    params, buffers: the model's collections.
    batch: of `abstract_batch`, or some of its rows.
    key: PRNG key of the dropout.
    total_weight: sum of the weights of the whole batch, so that the losses
      (and gradients) of its parts add up to those of the whole.
    config: the run's.
    layout: of the arrays on a mesh; None: one device.
    taps: zeros, whose gradients make factors of those of the tables; None
      where the tables' own gradients are asked for.
    behind: of the tables whose rows catch up, a `tables.Behind` each.
  Returns:
    (loss, (parts, stats, slots, read)): parts of the loss by name, monitoring
    scalars by "module/name", each memory's slots [B, T, A, M], and the
    collection "factors" where there are taps.
  """
  collections = ["losses", "stats", "intermediates"]
  logits_BTV, sown = Transformer(config.model, layout).apply(
    {
      "params": params,
      "buffers": buffers,
      "taps": taps or {},
      "behind": behind or {},
    },
    batch["tokens"],
    batch["segments"],
    batch["positions"],
    deterministic=False,
    rngs={"dropout": key},
    mutable=collections + ["factors"] if taps else collections,
  )
  loss_BT, log_z_BT = token_losses(logits_BTV, batch["targets"])
  weights_BT = batch["weights"]
  parts = {
    "loss": (loss_BT * weights_BT).sum() / total_weight,
    "z_loss": config.optim.z_loss
    * (jnp.square(log_z_BT) * weights_BT).sum()
    / total_weight,
    "auxiliary_loss": sum(jax.tree.leaves(sown.get("losses", {})))
    / jnp.float32(config.accumulation_steps),
  }
  stats = traverse_util.flatten_dict(sown.get("stats", {}), sep="/")
  stats = {name: value for name, (value,) in stats.items()}
  slots = {
    memory: values["slot_BTAM"][0]
    for memory, values in sown.get("intermediates", {}).items()
  }
  return sum(parts.values()), (parts, stats, slots, sown.get("factors", {}))


def count_usage(usage, slots, segments_BT, layout: Layout | None = None):
  """Adds the reads of each memory's slots; padding reads do not count."""

  def count(usage_S, slot_BTAM):
    present_BT11 = segments_BT[..., None, None] > 0
    # Past the end, where it does not count.
    slot_BTAM = jnp.where(present_BT11, slot_BTAM, usage_S.size)
    return sharded_lookup.count_rows(
      usage_S, slot_BTAM.reshape(*slot_BTAM.shape[:2], -1), layout
    )

  return {name: count(usage_S, slots[name]) for name, usage_S in usage.items()}


def make_taps(
  variables, batch: Batch, config: Config, layout: Layout | None = None
):
  """Zeros for the taps of every lookup of a batch."""
  _, collections = jax.eval_shape(
    lambda variables: Transformer(config.model, layout).apply(
      variables, batch["tokens"], mutable=["taps"]
    ),
    variables,
  )
  return jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), collections["taps"]
  )


def _part_gradients(state, tables, buffers, batch, key, total, config, layout):
  """Of a part of the batch: (gradients, factors of tables, outputs)."""
  values, taps = values_of(tables), None
  if tables:
    joined = tables_lib.join_tables(state.params, values)
    variables = {"params": joined, "buffers": buffers}
    taps = make_taps(variables, batch, config, layout)
  past = optim.table_past(config.optim, config.steps)
  behind = tables_lib.join_tables(
    {},
    {
      path: Behind(table, state.step, past)
      for path, table in tables.items()
      if past
    },
  )

  def loss(trained):
    params, taps = trained
    params = tables_lib.join_tables(params, values)
    return loss_fn(
      params, buffers, batch, key, total, config, layout, taps, behind
    )

  (gradients, tap_gradients), (*outputs, read) = jax.grad(loss, has_aux=True)(
    (state.params, taps)
  )
  factors = tables_lib.of_tables(values, read, tap_gradients, batch["segments"])
  return gradients, factors, outputs


def _gradients(
  state: TrainState, tables, buffers, batch: Batch, config: Config, layout
):
  """Over all parts of the batch: (gradients, factors, losses, stats, slots)."""
  parts = config.accumulation_steps
  total_weight = jnp.maximum(batch["weights"].sum(), 1.0)
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)

  def part(index, batch):
    return _part_gradients(
      state,
      tables,
      buffers,
      batch,
      jax.random.fold_in(key, index),
      total_weight,
      config,
      layout,
    )

  if parts == 1:
    gradients, factors, (losses, stats, slots) = part(0, batch)
    return gradients, factors, losses, stats, slots

  def accumulate(sums, inputs):
    index, batch = inputs
    gradients, factors, (losses, stats, slots) = part(index, batch)
    stats = jax.tree.map(lambda x: x / parts, stats)
    sums = jax.tree.map(jnp.add, sums, (gradients, losses, stats))
    return sums, (factors, slots)

  # Part i takes the rows i, i + parts, ..., so that every device finds its
  # share of each part among its own rows.
  split = jax.tree.map(
    lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch
  )
  shapes = jax.eval_shape(part, 0, jax.tree.map(lambda x: x[0], split))
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), (shapes[0], *shapes[2][:2])
  )
  (gradients, losses, stats), (factors, slots) = jax.lax.scan(
    accumulate, zeros, (jnp.arange(parts), split)
  )
  slots = jax.tree.map(lambda x: x.swapaxes(0, 1), slots)
  factors, slots = tables_lib.join_parts((factors, slots))
  return gradients, factors, losses, stats, slots


def gradient_step(
  state: TrainState,
  tables,
  batch: Batch,
  *,
  config: Config,
  layout: Layout | None = None,
):
  """An optimizer step but for the tables, whose gradients it returns.

  Args:
    state: before the step, without the tables.
    tables: by path; they are only read.
    batch: of `abstract_batch`; rows cut into config.accumulation_steps parts.
    config: static.
    layout: of the arrays on a mesh; None: one device. Static.
  Returns:
    (state, gradients, metrics): both of these for `table_step`; metrics are
    float32 scalars by name.
  """
  buffers = refresh_buffers(state.params, state.buffers)
  gradients, factors, losses, stats, slots = _gradients(
    state, tables, buffers, batch, config, layout
  )
  factors = layout_lib.constrain_whole(factors, layout)
  num_rows = {path: len(values) for path, values in values_of(tables).items()}
  reads = {
    path: sharded_update.sort_reads(f.row_TK, num_rows[path], layout)
    for path, f in factors.items()
  }
  norm = optax.tree.norm(gradients)
  if config.optim.clip_norm:  # else `table_step` adds the tables'
    norm = jnp.sqrt(
      jnp.square(norm)
      + sum(
        sharded_update.squared_norm(f, reads[path], num_rows[path], layout)
        for path, f in factors.items()
      )
    )
  optimizer = optim.make_optimizer(config.optim, config.steps)
  updates, opt_state = optimizer.update(
    gradients, state.opt_state, state.params, norm=norm
  )
  step = state.step + 1
  # Counted after the backward: a TPU runs few collectives beside its matmuls,
  # and those of the look-ups matter more.
  slots, _ = jax.lax.optimization_barrier((slots, norm))
  rates = optim.schedules(config.optim, config.steps)
  metrics = {
    **losses,
    "gradient_norm": norm,
    "learning_rate": rates["weights"](step),
    **stats,
  }
  if state.usage:
    metrics["value_learning_rate"] = rates["values"](step)
  state = state.replace(
    step=step,
    params=optax.apply_updates(state.params, updates),
    buffers=buffers,
    usage=count_usage(state.usage, slots, batch["segments"], layout),
    opt_state=opt_state,
  )
  scale = optim.clip_factor(config.optim, norm)
  return state, (factors, reads, scale, step), metrics


def table_step(
  tables: dict[str, Table],
  gradients,
  metrics,
  *,
  config: Config,
  layout: Layout | None = None,
):
  """The part of a step that `gradient_step` leaves.

  Args:
    tables: by path, before the step.
    gradients, metrics: of `gradient_step`.
    config, layout: static.
  Returns:
    (tables, metrics) after the step.
  """
  factors, reads, scale, step = gradients
  adamw = optim.table_adamw(config.optim, config.steps, step)
  key = jax.random.fold_in(jax.random.key(config.seed), 2)
  keys = jax.random.bits(
    jax.random.fold_in(key, step), (len(tables),), jnp.uint32
  )
  updated, squares = {}, jnp.square(metrics["gradient_norm"])
  for index, (path, table) in enumerate(sorted(tables.items())):
    updated[path], squares_of_table = sharded_update.update_rows(
      table, factors[path], reads[path], scale, adamw, keys[index], layout
    )
    squares += squares_of_table
  if not config.optim.clip_norm:
    metrics = {**metrics, "gradient_norm": jnp.sqrt(squares)}
  return updated, metrics


def train_step(
  state: TrainState,
  batch: Batch,
  *,
  config: Config,
  layout: Layout | None = None,
):
  """One optimizer step.

  As a single program, where the tables are read and written, XLA copies them
  if their update is sparse: `TrainProgram` has it in two.

  Args:
    state: before the step.
    batch: of `abstract_batch`; rows cut into config.accumulation_steps parts.
    config, layout: static.
  Returns:
    (state, metrics): float32 scalars by name.
  """
  state, tables = state.split_tables()
  state, gradients, metrics = gradient_step(
    state, tables, batch, config=config, layout=layout
  )
  tables, metrics = table_step(
    tables, gradients, metrics, config=config, layout=layout
  )
  return state.join_tables(tables), metrics


def catch_up(state: TrainState, *, config: Config) -> TrainState:
  """The state as a dense update of its tables would have left it.

  Where `optim.table_catch_up` lets rows stay behind, evaluations and saves want
  them all; other states come back as they are.
  """
  past = optim.table_past(config.optim, config.steps)
  rest, tables = state.split_tables()
  return rest.join_tables(
    {
      path: all_rows(table, state.step, past) if past else table
      for path, table in tables.items()
    }
  )


def eval_step(
  params, buffers, batch: Batch, *, config: Config, layout: Layout | None = None
):
  """Sums over a batch: of the losses in nats, weights and bytes.

  `bytes` counts the bytes of text that the targets stand for.
  """
  logits_BTV = Transformer(config.model, layout).apply(
    {"params": params, "buffers": buffers},
    batch["tokens"],
    batch["segments"],
    batch["positions"],
  )
  loss_BT, _ = token_losses(logits_BTV, batch["targets"])
  return {
    "loss": (loss_BT * batch["weights"]).sum(),
    "tokens": batch["weights"].sum(),
    "bytes": batch["bytes"].sum(),
  }


def report_usage(state: TrainState, *, config: Config):
  """How the tables were used since the last report, and a fresh start.

  Returns:
    (state with usage at zero, metrics): for each memory, the share of
    physical and of virtual rows in reach read, and KL(usage of physical rows ||
    uniform) in nats.
  """
  num_rows = config.model.memory.table_side**2
  num_slots = config.model.memory.grid_side**2
  metrics = {}
  for memory, usage_S in state.usage.items():
    usage_S = usage_S[:num_slots]
    usage_I = usage_S.reshape(-1, num_rows).sum(0)
    # In float32: the reads of all rows between two reports may be more than
    # an int32 holds, as those of a published config are.
    share_I = usage_I / jnp.maximum(usage_I.sum(dtype=jnp.float32), 1)
    metrics |= {
      f"{memory}/coverage": (usage_I > 0).mean(),
      f"{memory}/coverage_virtual": (usage_S > 0).mean(),
      f"{memory}/usage_kl": jnp.sum(
        jax.scipy.special.xlogy(share_I, share_I * num_rows)
      ),
    }
  usage = jax.tree.map(jnp.zeros_like, state.usage)
  return state.replace(usage=usage), metrics


def jitted(function, config: Config, layout: Layout | None = None, **options):
  """Returns jax.jit of a function, with config and layout bound.

  Args:
    function: takes arrays by position, config and layout by name.
    config: the run.
    layout: of the arrays on a mesh; None: one device.
    **options: of jax.jit.
  """
  bound = functools.partial(function, config=config, layout=layout)
  return jax.jit(bound, **options)
