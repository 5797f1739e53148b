"""A small UltraMem layer, which several tests of layers take."""

import dataclasses
import functools

import jax
import numpy as np

from ultramem_jax import MemoryConfig, UltraMem, testing

B, T, D = 2, 7, 16
SMALL = MemoryConfig(
  num_keys=6, key_dim=5, value_dim=8, top_m=3, init="official"
)


def layer_of(config=SMALL, **changes):
  config = dataclasses.replace(config, **changes)
  return UltraMem(config, embed_dim=D, num_layers=3, layer_index=1)


def inputs(length=T, seed=0):
  shape = (B, length, D)
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@functools.cache
def variables_of(layer):
  return testing.random_variables(layer, inputs())


@functools.partial(jax.jit, static_argnums=0)
def apply(layer, variables, x_BTD, segment_BT=None):
  return layer.apply(variables, x_BTD, segment_BT)
