"""A small transformer, which several tests take."""

import functools

import jax
import numpy as np

from ultramem_jax import Transformer, testing
from ultramem_jax.layers.attention import rotation
from ultramem_jax.model import Block

B, T = 2, 6
# Every position of a row has its own token.
TOKENS = np.stack([np.arange(T), np.arange(T)[::-1] + T]).astype(np.int32)
ONES = np.ones((B, T), np.int32)
POSITIONS = np.arange(T, dtype=np.int32) * ONES


def config(spans="1:2/2:2", **overrides):
  """Two blocks and two memories, one of them around a block."""
  overrides = {f"model__{name}": value for name, value in overrides.items()}
  return testing.small_config(
    **{"model__vocab_size": 32, "model__memory__spans": spans, **overrides}
  ).model


def dense_config(**overrides):
  return config("", memory__kind="none", **overrides)


MODELS = {"memories": config(), "mlp_conv": dense_config(mlp_conv=3)}


@functools.cache
def variables_of(c):
  return testing.random_variables(Transformer(c), TOKENS)


@functools.partial(jax.jit, static_argnums=0)
def apply(c, variables, tokens_BT, segment_BT=ONES, position_BT=POSITIONS):
  return Transformer(c).apply(variables, tokens_BT, segment_BT, position_BT)


def logits_of(c, tokens_BT, segment_BT=ONES, position_BT=POSITIONS):
  return apply(c, variables_of(c), tokens_BT, segment_BT, position_BT)


@functools.partial(jax.jit, static_argnums=(0, 3))
def apply_block(c, params, x_BTD, mlp_conv=0):
  return Block(c, mlp_conv=mlp_conv).apply(
    {"params": params}, x_BTD, ONES, rotation(c, POSITIONS), False, True
  )
