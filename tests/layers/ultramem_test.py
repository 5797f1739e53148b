"""The UltraMem layer: against a slow layer in numpy, and its properties."""

import dataclasses
import functools
import importlib
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ablation
from tests.layers import numpy_layer
from tests.layers.small_layer import (
  SMALL,
  B,
  D,
  T,
  apply,
  inputs,
  layer_of,
  variables_of,
)
from ultramem_jax import (
  ConfigError,
  MemoryConfig,
  MemoryPlus,
  Peer,
  UltraMem,
  UltraMemV2,
  refresh_buffers,
)
from ultramem_jax.ops import shuffle, tucker
from ultramem_jax.settings import config as config_lib
from ultramem_jax.testing import assert_close


@functools.partial(jax.jit, static_argnums=0)
def init_and_apply(layer, key, x_BTD):
  return layer.init_with_output(key, x_BTD)[0]


# The published ladder's shapes, shrunk.
SHRUNK = dict(
  num_keys={1224: 7, 1728: 10, 1000: 6},
  value_dim={1024: D, 512: D // 2},
  key_dim={2448: 24, 500: 10, 250: 5},
  top_m={21: 3, 42: 6},
)


@functools.cache
def ladder(row):
  """MemoryConfig of a row of the ablation, all changes before included."""
  fields = {}
  for name, changes in ablation.ROWS.items():
    fields |= {
      field: SHRUNK[field][value] if field in SHRUNK else value
      for field, value in changes.items()
    }
    if name == row:
      return MemoryConfig(**fields)


def ladder_output(row):
  layer = layer_of(ladder(row))
  return apply(layer, variables_of(layer), inputs())


@pytest.mark.parametrize("row", ablation.ROWS)
def test_each_row_of_the_ladder_is_the_slow_layer(row):
  """The first rows are product-key memory: softmax over the whole grid."""
  layer = layer_of(ladder(row))
  expected_BTD = numpy_layer.output(layer, variables_of(layer), inputs())
  assert_close(ladder_output(row), expected_BTD)


def test_each_switch_of_the_ladder_changes_the_output():
  rows = list(ablation.ROWS)
  for before, after in itertools.pairwise(rows):
    old, new = ladder_output(before), ladder_output(after)
    if after == "init":
      old, new = (
        init_and_apply(layer_of(ladder(row)), jax.random.key(0), inputs())
        for row in (before, after)
      )
    if after == "lr_decay":  # the optimizer's, not the layer's
      assert ladder(before) == ladder(after)
      continue
    assert abs(old - new).max() > 1e-3 * abs(old).max(), after


@pytest.mark.parametrize(
  "changes",
  [
    dict(query_per_rank=False, tucker_rank=3, query_key_norm="rms"),
    dict(num_heads=4, num_cores=4, expansion=9, query_conv=1),
    dict(shuffle="permutation", tucker_rank=1, heads_per_query=1),
    dict(score="sum", num_cores=1, expansion=4, shuffle="none"),
  ],
  ids=str,
)
def test_other_settings_are_the_slow_layer(changes):
  layer = layer_of(**changes)
  variables = variables_of(layer)
  y_BTD = apply(layer, variables, inputs())
  assert_close(y_BTD, numpy_layer.output(layer, variables, inputs()))


class Reader(nn.Module):
  """Anybody's model."""

  @nn.compact
  def __call__(self, x_BTD):
    x_BTD = nn.Dense(D)(x_BTD)
    x_BTD += UltraMem(SMALL, embed_dim=D)(x_BTD)
    return nn.Dense(1)(x_BTD)


@pytest.mark.parametrize(
  ("module", "fields"),
  [
    (UltraMem, {}),
    (UltraMemV2, {"kind": "ultramem_v2", "ring_layers": 1}),
    (MemoryPlus, {"kind": "memory_plus"}),
    (Peer, {"kind": "peer", "value_dim": D}),
  ],
)
def test_flax_maps_the_names_of_all_axes_to_a_mesh(module, fields):
  sizes = {"num_keys": 6, "key_dim": 5, "value_dim": 8, "top_m": 3}
  layer = module(MemoryConfig(**{**sizes, **fields}), embed_dim=D)
  shapes = jax.eval_shape(layer.init, jax.random.key(0), inputs())
  mesh = jax.make_mesh((1,), ("data",), (jax.sharding.AxisType.Auto,))
  found = nn.logical_to_mesh_sharding(
    nn.get_partition_spec(shapes), mesh, [("rows", "data")]
  )
  tables = [x for x in jax.tree.leaves(found) if "data" in x.spec]
  assert len(tables) == (2 if module is Peer else 1)


def test_standalone_in_a_flax_model():
  model = Reader()
  variables = jax.jit(model.init)(jax.random.key(0), inputs())
  assert set(variables) == {"params", "buffers"}

  def loss(params, buffers):
    y_BT1, sown = model.apply(
      {"params": params, "buffers": buffers}, inputs(), mutable=["losses"]
    )
    auxiliary = sum(jax.tree.leaves(sown["losses"]))
    return (y_BT1**2).mean() + auxiliary

  params = nn.unbox(variables["params"])
  gradient = jax.jit(jax.grad(loss))(params, variables["buffers"])
  for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
    assert np.isfinite(leaf).all() and leaf.any(), path
  buffers = jax.jit(refresh_buffers)(variables["params"], variables["buffers"])
  assert_close(buffers, variables["buffers"])


def test_variables_and_their_shapes():
  c = dataclasses.replace(SMALL, shuffle="permutation", num_heads=4)
  variables = jax.eval_shape(layer_of(c).init, jax.random.key(0), inputs())
  shapes = jax.tree.map(lambda x: x.shape, nn.unbox(variables))
  assert shapes == {
    "params": {
      "keys": (2, 4, 2, 12, 5),
      "core": (2, 4, 2, 2),
      "query": (D, 2, 2, 2, 5),
      "query_conv": {"kernel": (5, D)},
      "query_norm": {"scale": (5,)},
      "key_norm": {"scale": (5,)},
      "values": (36, 8),
      "value_projection": (4, 8, D),
    },
    "buffers": {"u": (4, 2), "t": (4, 2), "permutation": (144,)},
  }
  for leaf in jax.tree.leaves(variables["params"]):
    assert leaf.dtype == jnp.float32
  product_keys = jax.eval_shape(
    layer_of(ladder("pkm")).init, jax.random.key(0), inputs()
  )
  assert set(product_keys) == {"params"}
  assert set(product_keys["params"]) == {"keys", "query", "values"}


@pytest.mark.parametrize("shape", [(B, D), (B, T, D + 1), (B, 0, D)])
def test_wrong_shape_is_refused(shape):
  with pytest.raises(ValueError, match=rf"must be \[B, T, {D}\]"):
    jax.eval_shape(layer_of().init, jax.random.key(0), jnp.zeros(shape))


def test_what_does_not_fit_the_input_is_refused():
  with pytest.raises(ValueError, match=r"segment_BT has shape \(2, 6\): must"):
    jax.eval_shape(
      layer_of().init, jax.random.key(0), inputs(), jnp.ones((B, T - 1))
    )
  narrow = layer_of(ladder("pkm"), value_dim=D // 2)
  with pytest.raises(ConfigError, match=f"value_dim = 8: must equal .* = {D}"):
    jax.eval_shape(narrow.init, jax.random.key(0), inputs())


def test_bfloat16_is_close():
  layer = layer_of(top_m=12)  # all keys pass the filter, fewer choices change
  variables = variables_of(layer)
  exact_BTD = apply(layer, variables, inputs())
  y_BTD = apply(layer.copy(dtype=jnp.bfloat16), variables, inputs())
  assert y_BTD.dtype == jnp.bfloat16
  error = jnp.std(jnp.float32(y_BTD) - exact_BTD) / jnp.std(exact_BTD)
  assert error < 0.2  # measured 0.1: a changed choice costs much


def test_accelerators_round_neither_scores_nor_values():
  """Products of float32 numbers keep them so, beside bfloat16's own matmuls."""
  layer = layer_of().copy(dtype=jnp.bfloat16)
  variables = variables_of(layer)

  def loss(params):
    y_BTD = layer.apply({**variables, "params": params}, inputs())
    return jnp.float32(y_BTD).sum()

  traced = jax.jit(jax.grad(loss)).trace(variables["params"])
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  products = [line for line in text.splitlines() if "dot_general" in line]
  exact = [line for line in products if "[HIGHEST, HIGHEST]" in line]
  assert exact and len(exact) < len(products)
  for line in products:
    operands = line.rpartition(" : ")[2].partition(" -> ")[0]
    assert (line in exact) != ("bf16" in operands), line


def test_accelerators_keep_float32_scores():
  layer = layer_of()
  variables = variables_of(layer)
  traced = jax.jit(layer.apply).trace(variables, inputs())
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  # Keys of a side, [8, 12, 5], with queries.
  scores = [
    line
    for line in text.splitlines()
    if "dot_general" in line and "tensor<8x12x5xf32>" in line
  ]
  assert scores and all("[HIGHEST, HIGHEST]" in line for line in scores)


def test_causal():
  """No gradient to any input after the position, some to all five before."""
  layer = layer_of()
  variables = variables_of(layer)

  def at(x_BTD, position):
    y_BTD = layer.apply(variables, x_BTD)
    return jax.lax.dynamic_index_in_dim(y_BTD, position, 1).sum()

  gradient = jax.jit(jax.grad(at))
  for position in (0, 3, T - 1):
    reached = gradient(inputs(), position).any(axis=(0, 2))
    first = max(0, position - 4)  # five taps
    expected = [first <= t <= position for t in range(T)]
    np.testing.assert_array_equal(reached, expected)


def test_convolution_does_not_cross_documents():
  """Two documents and padding in one row: each as if it were alone."""
  layer = layer_of()
  variables = variables_of(layer)
  x_BTD = inputs()
  segment_BT = jnp.array([[0, 0, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 0, 0]])
  y_BTD = apply(layer, variables, x_BTD, segment_BT)
  assert np.isfinite(y_BTD).all()
  for row, start, end in ((0, 2, 5), (0, 5, 7), (1, 0, 4), (1, 4, 5)):
    # The document, moved to the front of a row of equal length.
    alone_BTD = np.zeros_like(x_BTD)
    alone_BTD[row, : end - start] = x_BTD[row, start:end]
    alone = apply(layer, variables, alone_BTD, jnp.ones((B, T), jnp.int32))
    assert_close(y_BTD[row, start:end], alone[row, : end - start])
  together = apply(layer, variables, x_BTD)
  assert abs(together - y_BTD).max() > 1e-2 * abs(together).max()


def test_decoding_needs_a_cache():
  layer = layer_of()
  with pytest.raises(ValueError, match="needs the collection 'cache'"):
    layer.apply(variables_of(layer), inputs(), None, True, mutable=["cache"])


def test_decoding_step_by_step_is_the_full_forward():
  """A prompt of three positions, then one at a time; a document ends."""
  layer = layer_of()
  variables = variables_of(layer)
  x_BTD = inputs()
  segment_BT = jnp.array([[1] * T, [0, 1, 1, 1, 1, 2, 2]])
  expected_BTD = apply(layer, variables, x_BTD, segment_BT)
  cache = jax.eval_shape(
    lambda: layer.init(jax.random.key(0), x_BTD, decode=True)
  )["cache"]
  cache = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), cache)

  @jax.jit
  def step(cache, x_BTD, segment_BT):
    return layer.apply(
      {**variables, "cache": cache}, x_BTD, segment_BT, True, mutable=["cache"]
    )

  outputs = []
  for start, end in ((0, 3), (3, 4), (4, 5), (5, 6), (6, 7)):
    y_BTD, updated = step(cache, x_BTD[:, start:end], segment_BT[:, start:end])
    cache = updated["cache"]
    outputs.append(y_BTD)
  assert_close(jnp.concatenate(outputs, 1), expected_BTD)


def test_permutation_set_to_the_hash_is_the_hash():
  hashed, stored = layer_of(), layer_of(shuffle="permutation")
  variables = variables_of(hashed)
  side = SMALL.grid_side
  row, column = np.divmod(np.arange(side**2, dtype=np.int32), side)
  permutation = shuffle.hash_shuffle(row, column, side, hashed.layer_index)
  buffers = {**variables["buffers"], "permutation": permutation}
  np.testing.assert_array_equal(
    apply(stored, {**variables, "buffers": buffers}, inputs()),
    apply(hashed, variables, inputs()),
  )


def test_layers_have_their_own_shuffle():
  layer = layer_of()
  variables = variables_of(layer)
  one = apply(layer, variables, inputs())
  other = apply(layer.copy(layer_index=2), variables, inputs())
  assert abs(one - other).max() > 0.1 * abs(one).max()


def test_sown_values():
  layer = layer_of()
  variables = variables_of(layer)
  collections = ("intermediates", "losses", "stats")
  sow = jax.jit(
    lambda variables, x: layer.apply(variables, x, mutable=collections)
  )
  y_BTD, sown = sow(variables, inputs())
  c = layer.config
  index, slot, score = (
    np.asarray(sown["intermediates"][name][0])
    for name in ("cell_BTAM", "slot_BTAM", "score_BTAMC")
  )
  assert index.shape == slot.shape == (B, T, c.num_heads, c.top_m)
  assert index.dtype == slot.dtype == np.int32
  assert score.shape == (*index.shape, c.num_cores)
  row, column = np.divmod(index, c.grid_side)
  assert (row < c.grid_side).all() and (index >= 0).all()
  np.testing.assert_array_equal(
    slot, shuffle.hash_shuffle(row, column, c.grid_side, layer.layer_index)
  )
  total = score.sum(-1)
  assert (np.diff(total) <= 0).all()  # best first
  assert len(np.unique(index[0, 0, 0])) == c.top_m  # no cell twice
  core = variables["params"]["core"]
  assert_close(
    sown["losses"]["auxiliary"][0],
    jax.jit(tucker.auxiliary_loss)(core, c.aux_loss_weight, c.aux_loss_margin),
  )
  stats = {name: value for name, (value,) in sown["stats"].items()}
  assert_close(stats["score_top_1"], total[..., 0].mean())
  assert_close(stats["score_top_m"], total[..., -1].mean())
  assert_close(stats["output_std"], np.std(y_BTD))
  lambda_AR = jax.jit(tucker.singular_values)(core)
  assert_close(
    stats["core_lambda_ratio"], (lambda_AR[:, 1] / lambda_AR[:, 0]).mean()
  )


def test_stats_leave_padding_out():
  layer = layer_of()
  variables = variables_of(layer)
  x_BTD = inputs()
  segment_BT = np.ones((B, T), np.int32)
  segment_BT[:, 3:] = 0

  @jax.jit
  def stats(x_BTD, segment_BT):
    _, sown = layer.apply(variables, x_BTD, segment_BT, mutable=["stats"])
    return sown["stats"]

  padded, cut = stats(x_BTD, segment_BT), stats(x_BTD[:, :3], None)
  assert_close(padded, cut)


def test_full_size_forward_is_small_and_sorts_nothing():
  """The layer of 151m_x12 on 2048 tokens, compiled alone."""
  config = importlib.import_module("configs.151m_x12").get_config()
  model = config_lib.parse(config).model
  layer = UltraMem(model.memory, embed_dim=model.embed_dim)
  x_BTD = jax.ShapeDtypeStruct((1, 2048, model.embed_dim), jnp.float32)
  variables = nn.unbox(jax.eval_shape(layer.init, jax.random.key(0), x_BTD))
  compiled = jax.jit(layer.apply).lower(variables, x_BTD).compile()
  # As a sort, the top-k would take 20 times longer.
  assert " sort(" not in compiled.as_text()
  # All scores of all keys would be 144 MiB, all rows read 336 MiB.
  assert compiled.memory_analysis().temp_size_in_bytes <= 64 * 2**20
