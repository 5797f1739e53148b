"""Loss and gradients on meshes against one device; see eight_devices_test."""

import functools

import jax
import numpy as np
import pytest

from ultramem_jax import testing
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import hlo
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train import sharding, step
from ultramem_jax.train import state as state_lib
from ultramem_jax.train.program import TrainProgram

MODELS = {
  "dense": {"model__memory__kind": "none"},
  "moe": {
    "model__memory__kind": "none",
    "model__moe__num_experts": 8,
    "model__moe__expert_dim": 16,
  },
  "pkm": {
    "model__memory__score": "sum",
    "model__memory__softmax": True,
    "model__memory__num_cores": 1,
    "model__memory__expansion": 1,
    "model__memory__query_key_norm": "none",
    "model__memory__query_conv": 0,
    "model__memory__shuffle": "none",
    "model__memory__init": "official",
    "model__memory__heads_per_query": 1,
  },
  "ultramem": {"model__memory__init": "paper"},
}
MODELS["distilled"] = {**MODELS["pkm"], "optim__distillation": 0.5}
MESHES = {
  "data": {"mesh__data": 8},
  "fsdp": {"mesh__fsdp": 8, "model__memory__storage__partition": "columns"},
  "table by rows": {
    "mesh__table": 4,
    "model__memory__storage__partition": "rows_unpooled",
  },
  "all": {
    "mesh__fsdp": 2,
    "mesh__tensor": 2,
    "mesh__table": 2,
    "model__memory__storage__partition": "rows",
  },
}


# A table, 256^2 rows of 16 floats, beside which all else is small.
LARGE = {
  "batch_size": 8,
  "model__num_layers": 1,
  "model__memory__spans": "1:1",
  "model__memory__num_keys": 256,
  "model__memory__value_dim": 16,
}
TABLE_BYTES = 256**2 * 16 * 4
# Of the rows that the devices read together, 384 reads, this many are updated.
TOP_T = 50
CHOSEN = {
  "optim__table_rows": "kl",
  "optim__table_top_t": TOP_T,
  "optim__table_counts": "counts",
}


def make_config(model, mesh=None):
  return testing.small_config(
    **LARGE, **MODELS[model], **(MESHES[mesh] if mesh else {})
  )


def assert_tables_stay(compiled, shards):
  """No operation between devices moves as much as one device's part."""
  for found in hlo.Program(compiled.as_text()).collectives(8):
    assert found.received / found.count < TABLE_BYTES / shards, found


def make_batch(config):
  rng = np.random.default_rng(0)
  shape = (config.batch_size, config.data.seq_len)
  draw = lambda: rng.integers(3, 264, shape).astype(np.int32)
  return {
    "tokens": draw(),
    "targets": draw(),
    "weights": rng.integers(0, 2, shape).astype(np.float32),
    "segments": np.ones(shape, np.int32),
    "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
  }


def gradient_fn(params, buffers, batch, config, layout):
  return jax.value_and_grad(
    lambda params: step.loss_fn(
      {"params": params, "buffers": buffers},
      batch,
      jax.random.key(0),
      30.0,
      config=config,
      layout=layout,
    ),
    has_aux=True,
  )(params)


@functools.cache
def on_one_device(model):
  config = make_config(model)
  variables = testing.random_state(config).variables()
  result = step.jitted(gradient_fn, config)(
    variables["params"], variables["buffers"], make_batch(config)
  )
  return jax.device_get((variables, result))


@functools.cache
def initialized(model):
  config = make_config(model)
  state = step.jitted(state_lib.init_state, config)()
  return jax.device_get(state.variables()["params"])


@pytest.mark.parametrize(
  "model, mesh",
  [
    ("dense", "all"),
    ("moe", "all"),
    ("pkm", "table by rows"),
    ("ultramem", "data"),
    ("ultramem", "fsdp"),
    ("ultramem", "all"),
    ("distilled", "all"),
  ],
)
def test_loss_and_gradients_equal_one_device(model, mesh):
  config = make_config(model, mesh)
  made = mesh_lib.make(config)
  layout = sharding.make_layout(config, made)
  abstract = state_lib.abstract_state(config, layout)
  variables, expected = on_one_device(model)
  if config.mesh.fsdp > 1:
    made_here = step.jitted(
      state_lib.init_state,
      config,
      layout,
      out_shardings=sharding.shardings_of(abstract),
    )()
    # Mesh or not, the first parameters are the same, calibration included.
    assert_close(made_here.variables()["params"], initialized(model))
  variables = jax.device_put(
    variables, sharding.shardings_of(abstract.variables())
  )
  inputs = (
    variables["params"],
    variables["buffers"],
    sharding.to_devices(make_batch(config), made),
  )
  compiled = step.jitted(gradient_fn, config, layout).lower(*inputs).compile()
  if config.model.spans and layout.size(layout.table_axes) == 8:
    # Without copies, whose dense gradients are summed.
    assert_tables_stay(compiled, 8)
  (loss, aux), gradients = compiled(*inputs)
  (expected_loss, expected_aux), expected_gradients = expected
  jax.tree.map(
    np.testing.assert_array_equal, aux["slots"], expected_aux["slots"]
  )
  assert_close(
    (loss, aux["losses"], gradients),
    (expected_loss, expected_aux["losses"], expected_gradients),
  )


@pytest.mark.parametrize(
  "mesh, settings",
  [
    (
      {"mesh__table": 4, "model__memory__storage__partition": "rows"},
      {"optim__clip_norm": 1.0, **CHOSEN},
    ),
    (
      {
        "mesh__fsdp": 2,
        "mesh__table": 2,
        "model__memory__storage__partition": "columns",
      },
      {"optim__clip_norm": 0.0},
    ),
  ],
)
def test_sparse_update_equals_one_device(mesh, settings):
  """Two steps, so that the second starts from moments and moved tables."""
  overrides = {**LARGE, "optim__table_update": "sparse", **settings}
  (expected, metrics), (actual, metrics_on_mesh) = (
    jax.device_get(train(testing.small_config(**overrides, **where)))
    for where in ({}, mesh)
  )
  np.testing.assert_allclose(
    metrics_on_mesh["gradient_norm"], metrics["gradient_norm"], rtol=1e-5
  )
  # Adam's first steps have the size of the rate whatever the gradient's, so
  # rounding shows where a gradient is all but zero: a hundredth of a step.
  assert_close(
    (actual.params, actual.tables),
    (expected.params, expected.tables),
    tolerance=1e-4,
  )
  # The same rows have changed, and as many as there were to choose.
  start_IW = first_state().tables["memory_0/values"].values_IW
  changed_I, expected_I = (
    (state.tables["memory_0/values"].values_IW != start_IW).any(1)
    for state in (actual, expected)
  )
  np.testing.assert_array_equal(changed_I, expected_I)
  if settings.get("optim__table_rows"):
    assert TOP_T <= changed_I.sum() <= 2 * TOP_T


def test_dense_optimizer_moves_no_tables():
  config = testing.small_config(
    **LARGE,
    optim__table_update="dense",
    mesh__fsdp=2,
    mesh__table=4,
    model__memory__storage__partition="rows",
  )
  state, metrics = train(config, 1)
  table = state.tables["memory_0/values"]
  assert all(x.sharding == table.values_IW.sharding for x in table)
  assert np.isfinite(metrics["gradient_norm"])


def compile_step(config):
  """(compiled step, batch) on config's mesh, if any."""
  devices = jax.devices()[: 8 if config.mesh.table > 1 else 1]
  layout = sharding.make_layout(config, mesh_lib.make(config, devices))
  rarity_I = np.random.default_rng(0).gamma(2.0, size=256**2)
  run_step = TrainProgram(
    config, layout, None, {"memory_0/values": rarity_I.astype(np.float32)}
  )
  if len(devices) > 1:
    for compiled in run_step.programs.values():
      assert_tables_stay(compiled, layout.size(layout.table_axes))
  return run_step, sharding.to_devices(make_batch(config), layout.mesh)


@functools.cache
def first_state():
  """The first state of all configs here."""
  config = testing.small_config(**LARGE, optim__table_update="sparse")
  return jax.device_get(testing.random_state(config))


@functools.cache
def train(config, steps=2):
  """The state after steps, and the metrics of the last."""
  run_step, batch = compile_step(config)
  state = jax.device_put(first_state(), sharding.shardings_of(run_step.state))
  for _ in range(steps):
    state, metrics = run_step(state, batch)
  return state, metrics
