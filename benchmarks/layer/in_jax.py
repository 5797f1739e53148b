"""Our side of benchmarks.layer, a process like that of the peers."""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.harness import worker
from benchmarks.layer.shape import (
  CORES,
  EMBED_DIM,
  EXPANSION,
  HEADS,
  KEY_DIM,
  NUM_KEYS,
  NUM_ROWS,
  RANK,
  TOP_M,
  VALUE_DIM,
  read_sets,
)
from ultramem_jax import MemoryConfig, UltraMem, refresh_buffers
from ultramem_jax.ops import lookup, row_update
from ultramem_jax.ops.cpu import sort
from ultramem_jax.serve import prepare as prepare_lib
from ultramem_jax.train import tables as tables_lib

# As torch's AdamW has them by default.
RATE, BETA1, BETA2, EPS, WEIGHT_DECAY = 1e-3, 0.9, 0.999, 1e-8, 1e-2

LAYER = UltraMem(
  MemoryConfig(
    kind="ultramem",
    num_keys=NUM_KEYS,
    key_dim=KEY_DIM,
    value_dim=VALUE_DIM,
    top_m=TOP_M,
    num_heads=HEADS,
    tucker_rank=RANK,
    num_cores=CORES,
    expansion=EXPANSION,
  ),
  EMBED_DIM,
)


Run = worker.Run


@functools.cache
def table() -> jax.Array:
  row_block_IW = jax.random.normal(jax.random.key(0), (NUM_KEYS, VALUE_DIM))
  return jax.jit(lambda x: jnp.tile(x, (NUM_ROWS // NUM_KEYS, 1)))(row_block_IW)


@functools.cache
def variables() -> Any:
  """Returns the layer's variables, its table one random block repeated."""

  @jax.jit
  def init(key):
    made: Any = LAYER.init(key, jnp.zeros((1, 1, EMBED_DIM)))
    del made["params"]["values"]
    return jax.tree.map(
      lambda x: x.value if hasattr(x, "value") else x,
      made,
      is_leaf=lambda x: hasattr(x, "value"),
    )

  made = init(jax.random.key(0))
  made["params"]["values"] = table()
  return made


def compiled(function: Callable[..., Any], *args: Any) -> Run:
  program = jax.jit(function).lower(*args).compile()
  return lambda: jax.block_until_ready(program(*args))


@functools.partial(jax.jit, static_argnums=1)
def reads(key: jax.Array, tokens: int) -> tuple[jax.Array, jax.Array]:
  keys = jax.random.split(key)
  shape = (1, tokens, TOP_M * HEADS)
  index_BTY = jax.random.randint(keys[0], shape, 0, NUM_ROWS)
  return index_BTY, jax.random.normal(keys[1], (*shape, 1))


def gather(function: Callable[..., jax.Array], tokens: int) -> Run:
  keys = jax.random.split(jax.random.key(tokens), read_sets(tokens))
  sets = [reads(key, tokens) for key in keys]
  program = jax.jit(function).lower(table(), *sets[0]).compile()
  turns = itertools.cycle(sets)
  return lambda: jax.block_until_ready(program(table(), *next(turns)))


def take_and_einsum(
  table_IW: jax.Array, index_BTY: jax.Array, score_BTYC: jax.Array
) -> jax.Array:
  rows_BTYW = jnp.take(table_IW, index_BTY, axis=0, mode="clip")
  return jnp.einsum("BTYW,BTYC->BTW", rows_BTYW, score_BTYC)


def inputs(tokens: int) -> jax.Array:
  return jax.random.normal(jax.random.key(tokens), (1, tokens, EMBED_DIM))


def forward(tokens: int) -> Run:
  model = LAYER, variables()
  x_BTD = inputs(tokens)
  if tokens == 1:  # decoding
    model = prepare_lib.prepare(*model, x_BTD)
  return compiled(model[0].apply, model[1], x_BTD)


def backward(tokens: int, dense: bool) -> Run:
  """Returns a call that computes gradients of input and parameters.

  Without `dense` the table has no gradient of its own: a sparse update takes
  factors of it, from which the other gradients are computed anyway.
  """
  made = variables()
  trained = dict(made["params"])
  values = {} if dense else {"values": trained.pop("values")}
  x_BTD = inputs(tokens)

  def loss(trained, x_BTD, values, buffers, cotangent_BTD):
    y_BTD, sown = LAYER.apply(
      {"params": {**trained, **values}, "buffers": buffers},
      x_BTD,
      mutable=["losses"],
    )
    return (y_BTD * cotangent_BTD).sum() + sown["losses"]["auxiliary"][0]

  return compiled(
    jax.grad(loss, (0, 1)),
    trained,
    x_BTD,
    values,
    made["buffers"],
    jax.random.normal(jax.random.key(1), x_BTD.shape),
  )


def own_table() -> row_update.Table:
  """Returns a table with moments, which may be updated in place."""
  values_IW = table()
  variables.cache_clear()
  table.cache_clear()
  return row_update.Table(
    values_IW, jnp.zeros_like(values_IW), jnp.zeros_like(values_IW)
  )


@functools.partial(jax.jit, donate_argnums=0)
def update(
  table: row_update.Table, gradient: Any, count: jax.Array
) -> row_update.Table:
  factors, reads = gradient
  adamw = row_update.AdamW(BETA1, BETA2, EPS, WEIGHT_DECAY, RATE, count)
  return row_update.update_rows(
    table, factors, reads, 1.0, adamw, jnp.uint32(0)
  )


def repeated(
  gradient_step: Callable[..., Any], state: Any, *inputs: jax.Array
) -> Run:
  """Returns a training step: gradient_step, then the table's update.

  Args:
    gradient_step: (state, table, *inputs) -> (state, the table's factors, what
      else is computed).
    state: what gradient_step carries.
    *inputs: the same at every step.
  """

  @functools.partial(jax.jit, donate_argnums=0)
  def compute(state, table, *inputs):
    state, of_table, others = gradient_step(state, table, *inputs)
    reads = sort.sort_by_row(of_table.row_TY, NUM_ROWS)
    return state, (of_table, reads), others

  table, count = own_table(), jnp.float32(0)

  def run():
    nonlocal state, table, count
    count += 1
    state, gradient, others = compute(state, table, *inputs)
    table = update(table, gradient, count)
    jax.block_until_ready((state, table, others))

  return run


def step(tokens: int) -> Run:
  """Returns a step of the layer: all gradients, and AdamW.

  Of the table, AdamW updates the rows that were read.
  """
  made = variables()
  trained = {k: v for k, v in made["params"].items() if k != "values"}
  optimizer = optax.adamw(RATE, BETA1, BETA2, EPS, weight_decay=WEIGHT_DECAY)
  x_BTD = inputs(tokens)
  cotangent_BTD = jax.random.normal(jax.random.key(1), x_BTD.shape)

  def loss_fn(variables):
    params = dict(variables["params"])
    x_BTD = params.pop("x")
    y_BTD, sown = LAYER.apply(
      {**variables, "params": params},
      x_BTD,
      mutable=["losses", *tables_lib.TABLE_COLLECTIONS],
    )
    auxiliary = sown["losses"]["auxiliary"][0]
    return (y_BTD * cotangent_BTD).sum() + auxiliary, sown

  def gradient_step(state, table, x_BTD):
    trained, buffers, moments = state
    buffers = refresh_buffers(trained, buffers)
    _, gradient, factors = tables_lib.sparse_value_and_grad(loss_fn)(
      {"params": {**trained, "x": x_BTD}, "buffers": buffers}, {"values": table}
    )
    x_gradient, of_table = gradient.pop("x"), factors["values"]
    updates, moments = optimizer.update(gradient, moments, trained)
    trained = optax.apply_updates(trained, updates)
    return (trained, buffers, moments), of_table, x_gradient

  state = trained, made["buffers"], optimizer.init(trained)
  del made
  return repeated(gradient_step, state, x_BTD)


def lookup_step(tokens: int) -> Run:
  """Returns a step of a lookup: sums, gradient of weights, AdamW of rows."""
  cotangent_BTEW = jax.random.normal(
    jax.random.key(1), (1, tokens, 1, VALUE_DIM)
  )

  def gradient_step(state, table, index_BTY, score_BTYC, cotangent_BTEW):
    pooled_BTEW, pullback = jax.vjp(
      functools.partial(lookup.pool_rows, table.values_IW, index_BTY),
      score_BTYC,
    )
    of_table = tables_lib.merge_leading(
      row_update.Factors(
        index_BTY, jnp.zeros_like(index_BTY), score_BTYC, cotangent_BTEW
      )
    )
    return state, of_table, (pooled_BTEW, pullback(cotangent_BTEW))

  return repeated(
    gradient_step, (), *reads(jax.random.key(0), tokens), cotangent_BTEW
  )


CASES = {
  "gather/ours": lambda tokens: gather(lookup.pool_rows, tokens),
  "gather/take + einsum": lambda tokens: gather(take_and_einsum, tokens),
  "forward/ours": forward,
  "backward/ours": lambda tokens: backward(tokens, False),
  "backward/ours dense": lambda tokens: backward(tokens, True),
  "step/ours": step,
  "step/our lookup": lookup_step,
}

if __name__ == "__main__":
  worker.serve(CASES)
