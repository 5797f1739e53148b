"""A run that moves between meshes, and its model used on some of them."""

import contextlib
import functools
import shutil

import jax
import numpy as np
import pytest

from ultramem_jax import data, testing
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.evaluation import scoring
from ultramem_jax.model import Transformer
from ultramem_jax.runs import array_reader, checkpoint, step_writer, workdir
from ultramem_jax.serve import generate
from ultramem_jax.serve import load as load_lib
from ultramem_jax.serve import prepare as prepare_lib
from ultramem_jax.settings.sampling import Sampling
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import training
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train import sharding, start

EIGHT_BY_ROWS = (
  8,
  {
    "mesh__fsdp": 2,
    "mesh__table": 4,
    "model__memory__storage__partition": "rows",
  },
)
FOUR_BY_COLUMNS = (
  4,
  {"mesh__table": 4, "model__memory__storage__partition": "columns"},
)
ONE = (1, {})


@pytest.fixture(scope="module", autouse=True)
def large():
  """Saves and restores as if the tables of these tests were large."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_writer, "CHUNK_BYTES", 1024)
    patch.setattr(array_reader, "BLOCK_BYTES", 2048)
    patch.setattr(array_reader, "AHEAD_BYTES", 4096)
    yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  path = tmp_path_factory.mktemp("corpus") / "text.txt"
  path.write_text("To be read by models of eight devices. " * 30)
  return {
    "data__source": "text",
    "data__path": str(path),
    "data__valid_path": str(path),
  }


def make_config(corpus, mesh):
  return testing.small_config(
    batch_size=8,
    optim__table_update="sparse",
    model__num_layers=1,
    model__memory__spans="1:1",
    **corpus,
    **mesh,
  )


@functools.cache
def compile_step(config, devices):
  """(mesh, compiled training step) of a config on the first devices."""
  mesh = mesh_lib.make(config, jax.devices()[:devices])
  return mesh, training.compile_step(config, sharding.make_layout(config, mesh))


def run(folder, corpus, place, until):
  """Goes on until a step; (state it began with, losses, state it ended with).

  As train.py does it, but for the devices.
  """
  devices, settings = place
  config = make_config(corpus, settings)
  workdir.claim(folder, config, "the corpus")
  mesh, run_step = compile_step(config, devices)
  losses = []
  with (
    contextlib.closing(data.open(config).train(range(8))) as batches,
    checkpoint.Checkpointer(folder, 2) as saver,
  ):
    state, restored = start.restore_or_init(
      saver, run_step, batches, None, None, sharding.make_layout(config, mesh)
    )
    first = jax.device_get(state.to_items())
    for _ in range(restored.step if restored else 0, until):
      batch = sharding.to_devices(next(batches), mesh)
      state, values = run_step(state, batch)
      losses.append(float(values["loss"]))
    saver.save(until, state.to_items(), batches.get_state())
  return first, losses, jax.device_get(state.to_items())


@pytest.fixture(scope="module")
def saved(corpus, tmp_path_factory):
  """The workdir of a run that eight devices began, and its state."""
  folder = tmp_path_factory.mktemp("run")
  return folder, run(folder, corpus, EIGHT_BY_ROWS, 3)[2]


@pytest.fixture(scope="module")
def unmoved(saved, corpus, tmp_path_factory):
  """The losses of that run, going on where it was."""
  folder = tmp_path_factory.mktemp("unmoved")
  shutil.copytree(saved[0], folder, dirs_exist_ok=True)
  return run(folder, corpus, EIGHT_BY_ROWS, 6)[1]


@pytest.mark.parametrize("place", [FOUR_BY_COLUMNS, ONE])
def test_a_run_goes_on_with_other_devices(
  saved, unmoved, corpus, place, tmp_path
):
  folder, state = saved
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  first, losses, _ = run(tmp_path, corpus, place, 6)
  jax.tree.map(np.testing.assert_array_equal, first, state)
  # Sums over devices are taken in another order.
  np.testing.assert_allclose(losses, unmoved, rtol=1e-5)


def use(config, layout, variables):
  """(evaluation and scores of texts, drawn tokens) of a model."""
  model = Transformer(config.model, layout)
  scores = scoring.Scorer(
    load_lib.TrainedModel(config, 0, model, variables, layout)
  ).log_likelihoods([("a", "bc"), ("", "longer than a window")])
  validate = loss_lib.on_validation_split(config, data.open(config), layout)
  result = validate(variables)
  model, variables = prepare_lib.prepare(model, variables)
  tokens = generate.generate(
    model,
    variables,
    [np.array([5, 6, 7]), np.array([8])],
    Sampling(6),
    jax.random.key(0),
  )
  return (result, scores), [row_N.tolist() for row_N in tokens]


def test_models_are_evaluated_and_sampled_where_they_lie(saved, corpus):
  folder, state = saved
  config = make_config(corpus, {})
  mesh = mesh_lib.make(config, jax.devices()[:1])
  expected, tokens = use(
    config,
    sharding.make_layout(config, mesh),
    {name: state[name] for name in ("params", "buffers")},
  )
  # Two meshes in one process: neither may run what was traced for the other.
  for mesh in ({}, {"fsdp": 1, "table": 8}):
    loaded = load_lib.load(folder, mesh=mesh)
    values_IW = loaded.variables["params"]["memory_0"]["values"]
    for shard in values_IW.addressable_shards:
      assert shard.data.size * 8 == values_IW.size
    result, drawn = use(loaded.config, loaded.layout, loaded.variables)
    assert_close(result, expected, tolerance=1e-6)
    assert drawn == tokens
