"""Steps of small models, which several tests of training take."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax import testing
from ultramem_jax.model import Transformer
from ultramem_jax.train import step
from ultramem_jax.train.program import TrainProgram


def make_config(**overrides):
  """A model of one layer that learns fast, with all parts of the loss."""
  return testing.small_config(
    **{
      "model__num_layers": 1,
      "model__memory__spans": "1:1",
      "model__memory__aux_loss_margin": 0.0,
      "optim__z_loss": 0.01,
      "optim__learning_rate": 0.01,
      "optim__warmup_fraction": 0.0,
      **overrides,
    }
  )


CONFIG = make_config()
TWO_PARTS = make_config(accumulation_steps=2)
# A step reads some of the rows, and its gradients are clipped. Adam does not
# magnify the rounding of gradients that are all but zero.
SPARSE_SETTINGS = {
  "optim__eps": 1e-5,
  "model__memory__num_keys": 16,
  "optim__clip_norm": 0.1,
  "optim__table_update": "sparse",
}
SPARSE = make_config(**SPARSE_SETTINGS)


def make_batch(config=CONFIG, seed=0):
  """Random documents; the rows end in 0, 1, 2 ... tokens of padding."""
  rng = np.random.default_rng(seed)
  shape = (config.batch_size, config.data.seq_len)
  slot_BT = np.broadcast_to(np.arange(shape[1]), shape)
  present_BT = slot_BT < shape[1] - np.arange(shape[0])[:, None]
  second_BT = slot_BT >= 3
  batch = {
    "tokens": rng.integers(0, 256, shape, np.int32),
    "targets": rng.integers(0, 256, shape, np.int32),
    "weights": present_BT & (slot_BT != 2),
    "segments": np.where(present_BT, 1 + second_BT, 0),
    "positions": np.where(second_BT, slot_BT - 3, slot_BT),
  }
  return {
    name: jnp.asarray(batch[name], spec.dtype)
    for name, spec in step.abstract_batch(config).items()
  }


@functools.cache
def train_program(config):
  return TrainProgram(config)


def train_step(state, batch, config=CONFIG):
  """A step from a copy of the state, which the program takes over."""
  return train_program(config)(jax.tree.map(jnp.array, state), batch)


@functools.cache
def first_state(config=CONFIG):
  return testing.random_state(config)


@functools.cache
def first_step(config=CONFIG):
  """(state, metrics) after the first step on the first batch."""
  return train_step(first_state(config), make_batch(config), config)


@functools.cache
def forward(model):
  """(variables, batch) -> logits and what the memories sow, jitted."""
  return jax.jit(
    lambda variables, batch: Transformer(model).apply(
      variables,
      batch["tokens"],
      batch["segments"],
      batch["positions"],
      mutable=["intermediates"],
    )
  )


def differ(one, other):
  """Whether some leaf of two trees differs."""
  return any(
    (np.asarray(a) != np.asarray(b)).any()
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  )


def assert_same_bits(actual, expected):
  chex.assert_trees_all_equal_structs(actual, expected)
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert np.asarray(a).tobytes() == np.asarray(e).tobytes()
