"""Our side of benchmarks.layer, a process like that of the peers."""

import functools
import itertools

import jax
import jax.numpy as jnp

from benchmarks import worker
from benchmarks.layer_shape import (
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
from ultramem_jax import MemoryConfig, UltraMem, serving
from ultramem_jax.ops import lookup

LAYER = UltraMem(
    MemoryConfig(
        kind="ultramem", num_keys=NUM_KEYS, key_dim=KEY_DIM,
        value_dim=VALUE_DIM, top_m=TOP_M, num_heads=HEADS, tucker_rank=RANK,
        num_cores=CORES, expansion=EXPANSION,
    ),
    EMBED_DIM,
)


@functools.cache
def table():
  row_block_IW = jax.random.normal(jax.random.key(0), (NUM_KEYS, VALUE_DIM))
  return jax.jit(lambda x: jnp.tile(x, (NUM_ROWS // NUM_KEYS, 1)))(row_block_IW)


@functools.cache
def variables():
  """Of the layer; the table is not drawn at random, which takes a while."""

  @jax.jit
  def init(key):
    made = LAYER.init(key, jnp.zeros((1, 1, EMBED_DIM)))
    del made["params"]["values"]
    return jax.tree.map(
        lambda x: x.value if hasattr(x, "value") else x, made,
        is_leaf=lambda x: hasattr(x, "value"),
    )

  made = init(jax.random.key(0))
  made["params"]["values"] = table()
  return made


def compiled(function, *args):
  program = jax.jit(function).lower(*args).compile()
  return lambda: jax.block_until_ready(program(*args))


@functools.partial(jax.jit, static_argnums=1)
def reads(key, tokens):
  keys = jax.random.split(key)
  shape = (1, tokens, TOP_M * HEADS)
  index_BTK = jax.random.randint(keys[0], shape, 0, NUM_ROWS)
  return index_BTK, jax.random.normal(keys[1], (*shape, 1))


def gather(function, tokens):
  keys = jax.random.split(jax.random.key(tokens), read_sets(tokens))
  sets = [reads(key, tokens) for key in keys]
  program = jax.jit(function).lower(table(), *sets[0]).compile()
  turns = itertools.cycle(sets)
  return lambda: jax.block_until_ready(program(table(), *next(turns)))


def take_and_einsum(table_IW, index_BTK, score_BTKC):
  rows_BTKW = jnp.take(table_IW, index_BTK, axis=0, mode="clip")
  return jnp.einsum("BTKW,BTKC->BTW", rows_BTKW, score_BTKC)


def inputs(tokens):
  return jax.random.normal(jax.random.key(tokens), (1, tokens, EMBED_DIM))


def forward(tokens):
  prepared = variables()
  x_BTD = inputs(tokens)
  if tokens == 1:  # decoding
    prepared = serving.prepare(LAYER, prepared, x_BTD)
  return compiled(LAYER.apply, prepared, x_BTD)


def backward(tokens, dense):
  """Gradients of input and parameters.

  Without `dense`, of all but the table: what then remains of its gradient are
  the factors that a sparse update takes, which the others are computed from.
  """
  made = variables()
  trained = dict(made["params"])
  values = {} if dense else {"values": trained.pop("values")}
  x_BTD = inputs(tokens)

  def loss(trained, x_BTD, values, buffers, cotangent_BTD):
    y_BTD, sown = LAYER.apply(
        {"params": {**trained, **values}, "buffers": buffers}, x_BTD,
        mutable=["losses"],
    )
    return (y_BTD * cotangent_BTD).sum() + sown["losses"]["auxiliary"][0]

  return compiled(
      jax.grad(loss, (0, 1)), trained, x_BTD, values, made["buffers"],
      jax.random.normal(jax.random.key(1), x_BTD.shape),
  )


CASES = {
    "gather/ours": lambda tokens: gather(lookup.pool_rows, tokens),
    "gather/take + einsum": lambda tokens: gather(take_and_einsum, tokens),
    "forward/ours": forward,
    "backward/ours": lambda tokens: backward(tokens, False),
    "backward/ours dense": lambda tokens: backward(tokens, True),
}

if __name__ == "__main__":
  worker.serve(CASES)
