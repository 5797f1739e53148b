"""New runs that begin with the parameters of another run."""

import dataclasses
import os

import flax.linen as nn
import jax
import numpy as np
import pytest
from flax import traverse_util

from configs import from_run
from ultramem_jax import testing
from ultramem_jax.model import Transformer
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.errors import CheckpointError, ConfigError
from ultramem_jax.tools import quantize
from ultramem_jax.train import init_from, sharding
from ultramem_jax.train import mesh as mesh_lib

SIZES = {"model__num_layers": 2, "optim__table_update": "dense"}
BACKBONE = testing.small_config(**SIZES, model__memory__kind="none")


def with_memory(source, **overrides):
  return testing.small_config(
    **{
      **SIZES,
      "model__memory__spans": "1:2",
      "init_from": str(source),
      **overrides,
    }
  )


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
  folder = tmp_path_factory.mktemp("backbone")
  testing.save_run(folder, BACKBONE)
  return folder


def flat(tree):
  return traverse_util.flatten_dict(tree, sep="/")


def loaded(config):
  """The collections of a new run, and those that it would have alone."""
  mesh = mesh_lib.make(config, jax.devices()[:1])
  fresh = jax.device_put(
    testing.random_state(dataclasses.replace(config, seed=5)).variables(),
    jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()),
  )
  return init_from.load(init_from.plan(config), fresh, mesh), fresh


def test_tables_in_int8_are_left_out_where_init_skip_names_them(tmp_path):
  storage = "model__memory__storage__table_dtype"
  theirs = dict(model__memory__spans="1:2", eval_batches=1)
  source = testing.small_config(**SIZES | theirs, **{storage: "float32"})
  testing.save_run(tmp_path / "run", source)
  run = load_lib.load(tmp_path / "run")
  quantize.quantize_run(run, tmp_path / "run", tmp_path / "int8", "int8")
  with pytest.raises(ConfigError, match="int8 and those here float32: set"):
    init_from.plan(with_memory(tmp_path / "int8"))
  config = with_memory(tmp_path / "int8", init_skip="^memory_0/values")
  variables, fresh = loaded(config)
  held = flat(run.variables["params"])
  for path, array in flat(variables["params"]).items():
    expected = flat(fresh["params"]) if "values" in path else held
    np.testing.assert_array_equal(array, expected[path])


def test_the_moments_of_a_source_do_not_decide_how_its_tables_lie(tmp_path):
  """Rows have one second moment, so that their columns are not split."""
  odd = {"model__memory__num_keys": 9, "mesh__table": 2}
  row = {"optim__table_second_moment": "row", "optim__table_update": "auto"}
  testing.save_run(tmp_path, with_memory("", **odd | row | {"mesh__table": 1}))
  plan = init_from.plan(with_memory(tmp_path, **odd))
  mesh = jax.sharding.AbstractMesh((1, 1, 1, 2), sharding.MESH_AXES)
  assert sharding.make_layout(plan.config, mesh).partition == "columns"


@pytest.mark.parametrize("step", ["", "@7", "@newest"])
def test_what_both_models_have_is_taken(backbone, step):
  config = with_memory(f"{backbone}{step}")
  plan = init_from.plan(config)
  variables, fresh = loaded(config)
  held = flat(testing.random_state(BACKBONE).variables()["params"])
  params, fresh = flat(variables["params"]), flat(fresh["params"])
  assert params.keys() == fresh.keys()
  assert set(plan.taken) == held.keys() and plan.left == []
  assert set(plan.new) == {x for x in params if x.startswith("memory_0")}
  for path, leaf in params.items():
    np.testing.assert_array_equal(leaf, held.get(path, fresh[path]))
  assert variables["buffers"].keys() == {"memory_0"}


@pytest.mark.parametrize(
  "field, value, started",
  [
    ("output", "zero", "value_projection"),
    ("output", "empty", "values"),
    ("gate", "input", "gating/scale"),
  ],
)
def test_a_new_memory_leaves_the_model_as_it_is(
  backbone, field, value, started
):
  config = with_memory(backbone, **{f"model__memory__{field}": value})
  tokens_BT = np.arange(14, dtype=np.int32).reshape(2, 7)
  model = Transformer(config.model)
  initial = jax.jit(model.init)(jax.random.key(0), tokens_BT)
  held = testing.random_state(BACKBONE).variables()["params"]
  params = {**jax.tree.map(lambda x: x, initial["params"]), **held}
  actual = jax.jit(model.apply)(
    {"params": params, "buffers": initial["buffers"]}, tokens_BT
  )
  alone = jax.jit(Transformer(BACKBONE.model).apply)
  # The logits of the model that it was put into, to the bit.
  np.testing.assert_array_equal(actual, alone({"params": held}, tokens_BT))

  def loss(memory):
    variables = {**params, "memory_0": memory}
    logits_BTV = model.apply(
      {"params": variables, "buffers": initial["buffers"]}, tokens_BT
    )
    return jax.nn.logsumexp(logits_BTV, axis=-1).sum()

  gradient = jax.jit(jax.grad(loss))(nn.unbox(params["memory_0"]))
  assert np.abs(flat(gradient)[started]).max() > 0


def test_what_is_skipped_and_what_only_the_source_has(backbone, tmp_path):
  plan = init_from.plan(with_memory(backbone, init_skip="^head|block_1/mlp"))
  assert "head/kernel" in plan.new or "head" in plan.new
  assert not any(x.startswith(("head", "block_1/mlp")) for x in plan.taken)
  testing.save_run(tmp_path, with_memory(backbone))
  plan = init_from.plan(dataclasses.replace(BACKBONE, init_from=str(tmp_path)))
  assert plan.left and all(x.startswith("memory_0") for x in plan.left)
  assert init_from.describe(plan).startswith(
    f"parameters from {tmp_path}@newest: block_0/"
  )
  assert "; new: nothing; left out: memory_0/" in init_from.describe(plan)


def test_buffers_go_with_their_parameters(tmp_path):
  """Of a memory with other keys, and of one whose core begins anew."""
  shuffled = {"model__memory__shuffle": "permutation"}
  testing.save_run(tmp_path, with_memory("", **shuffled))
  held = flat(testing.random_state(with_memory("", **shuffled)).variables())
  keys = 2 * with_memory("").model.memory.num_keys
  for skip, changed, own in (
    (
      "memory_0/(keys|values)",
      {"model__memory__num_keys": keys},
      "permutation",
    ),
    ("memory_0/core", {}, "u"),
    ("memory_0/core", {}, "t"),
  ):
    config = with_memory(tmp_path, init_skip=skip, **shuffled, **changed)
    variables, fresh = map(flat, loaded(config))
    for path in (x for x in fresh if x.startswith("buffers/")):
      is_own = path.endswith(f"/{own}") or (
        own in "ut" and path.endswith(("/u", "/t"))
      )
      np.testing.assert_array_equal(
        variables[path], (fresh if is_own else held)[path]
      )


def test_settings_that_change_what_parameters_mean_are_told(backbone):
  told = lambda **overrides: init_from.describe(
    init_from.plan(with_memory(backbone, **overrides))
  )
  assert "other settings" not in told(model__dropout_rate=0.1)
  assert told(model__rope_theta=5e5, model__norm_eps=1e-6).endswith(
    "; other settings: model.norm_eps = 1e-06 (there 1e-05), "
    "model.rope_theta = 500000.0 (there 10000.0)"
  )


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"model__mlp_dim": 20}, "has the shape .* there and .* here: change the"),
    ({"init_skip": "."}, "has no parameter of this model"),
    ({"init_skip": "haed"}, "'haed': matches no parameter; there are block_0/"),
    ({"init_from": "no/such"}, "no such directory"),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_is_read(
  backbone, overrides, message
):
  with pytest.raises(ConfigError, match=message):
    init_from.plan(with_memory(backbone, **overrides))


def test_the_config_of_a_run_begins_with_its_parameters(backbone):
  c = from_run.get_config(str(backbone))
  c.model.memory.kind, c.model.memory.spans = "ultramem", "1:2"
  expected = dataclasses.replace(
    with_memory(backbone), init_from=os.fspath(backbone)
  )
  assert config_lib.parse(c).model == expected.model
  assert config_lib.parse(c).init_from == str(backbone)
  # What another kind of memory has as its own is not that of the backbone.
  c.model.memory.kind = "memory_plus"
  assert config_lib.parse(c).model.memory.score == "sum"


def test_the_config_of_a_run_takes_all_of_it_at_the_step_that_is_named(
  backbone, tmp_path
):
  """Though the run itself began without some of another's parameters."""
  testing.save_run(
    tmp_path, with_memory(backbone, init_skip="memory"), "some text"
  )
  c = from_run.get_config(f"{tmp_path}@7")
  assert c.init_from == f"{tmp_path}@7"
  plan = init_from.plan(config_lib.parse(c))
  assert "memory_0/values" in plan.taken and not plan.new
  assert plan.step == "7"


def test_other_settings_of_a_memory_that_is_taken_are_told(backbone, tmp_path):
  testing.save_run(tmp_path, with_memory(backbone))
  told = lambda **overrides: (
    init_from.plan(with_memory(tmp_path, **overrides)).changed
  )
  assert told(model__memory__aux_loss_weight=0.5) == []
  assert told(model__memory__storage__kernel="pallas") == []
  assert told(model__memory__top_m=2, model__memory__spans="2:2") == [
    "model.memory.top_m = 2 (there 3)",
    "model.memory.spans = '2:2' (there '1:2')",
  ]
  assert told(model__memory__top_m=2, init_skip="memory") == []


def test_a_step_that_is_not_there_is_told_before_anything_is_compiled(backbone):
  with pytest.raises(CheckpointError, match="saved: 7"):
    init_from.plan(with_memory(f"{backbone}@3"))
