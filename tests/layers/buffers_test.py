"""Buffers are refreshed from the cores."""

import flax
import flax.linen as nn
import jax
import numpy as np
import pytest

from tests.layers.small_layer import (
  SMALL,
  D,
  apply,
  inputs,
  layer_of,
  variables_of,
)
from ultramem_jax import UltraMem, refresh_buffers
from ultramem_jax.ops import tucker
from ultramem_jax.testing import assert_close


def test_buffers_of_stacked_layers_are_refreshed_by_vmap():
  class Block(nn.Module):
    @nn.compact
    def __call__(self, x_BTD, _):
      return x_BTD + UltraMem(SMALL, embed_dim=D)(x_BTD), None

  stack = nn.scan(
    Block,
    variable_axes={"params": 0, "buffers": 0},
    length=2,
    split_rngs={"params": True},
    metadata_params={nn.PARTITION_NAME: None},
  )()
  variables = jax.jit(stack.init)(jax.random.key(0), inputs(), None)
  params, buffers = nn.unbox(variables["params"]), variables["buffers"]
  stale = jax.tree.map(lambda x: 0.5 * x, buffers)
  refreshed = jax.jit(jax.vmap(refresh_buffers))(params, stale)
  assert_close(refreshed, buffers)


def test_frozen_dicts_are_refreshed_too():
  layer = layer_of()
  variables = variables_of(layer)
  nested = {name: {"memory": x} for name, x in variables.items()}
  nested["params"]["memory"] = {
    **variables["params"],
    "core": np.random.default_rng(0).uniform(
      size=variables["params"]["core"].shape
    ),
  }
  plain, frozen = (
    refresh_buffers(kind(nested["params"]), kind(nested["buffers"]))
    for kind in (dict, flax.core.freeze)
  )
  before = nested["buffers"]["memory"]["u"]
  assert abs(plain["memory"]["u"] - before).max() > 0.01
  assert_close(frozen["memory"]["u"], plain["memory"]["u"])


def test_swapped_collections_are_refused():
  variables = variables_of(layer_of())
  params, buffers = variables["params"], variables["buffers"]
  with pytest.raises(ValueError, match=r"refresh_buffers\(params, buffers\)"):
    refresh_buffers(buffers, params)


def test_refresh_buffers():
  """Pure; u and t follow the cores with their sign, the rest stays."""
  layer = layer_of(shuffle="permutation")
  variables = variables_of(layer)
  params, buffers = variables["params"], variables["buffers"]
  flipped = {**buffers, "u": -buffers["u"], "t": -buffers["t"]}
  core = params["core"] + 0.05 * np.random.default_rng(0).normal(
    size=params["core"].shape
  ).astype(np.float32)
  before = jax.tree.map(np.array, flipped)
  refreshed = jax.jit(refresh_buffers)({**params, "core": core}, flipped)
  u_AR, t_AR = jax.jit(tucker.filter_vectors)(core)
  assert_close(refreshed["u"], -u_AR)
  assert_close(refreshed["t"], -t_AR)
  np.testing.assert_array_equal(
    refreshed["permutation"], buffers["permutation"]
  )
  jax.tree.map(np.testing.assert_array_equal, flipped, before)
  # The forward reads them from the buffers, never from the cores.
  one, other = (
    apply(layer, {"params": params, "buffers": b}, inputs())
    for b in (buffers, flipped)
  )
  assert abs(one - other).max() > 0.1 * abs(one).max()
