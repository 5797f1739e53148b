"""Loading a trained model: which step, and on which devices."""

import json

import jax
import numpy as np
import pytest

from ultramem_jax import testing
from ultramem_jax.runs import checkpoint
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.errors import CheckpointError, ConfigError

CONFIG = testing.small_config(
  model__num_layers=1,
  model__memory__spans="1:1",
  model__dtype="bfloat16",
  mesh__data=2,
  mesh__fsdp=2,
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Of a run on four GPUs."""
  folder = tmp_path_factory.mktemp("run")
  testing.save_run(folder, CONFIG)
  held = json.loads((folder / "config.json").read_text())
  held["config"]["model"]["attention"] = "cudnn"
  (folder / "config.json").write_text(json.dumps(held))
  return folder


def test_a_run_of_gpus_is_used_without_them(workdir):
  run = load_lib.load(workdir)
  assert run.step == 7
  assert run.config.model.attention == "xla"
  assert run.layout.mesh.size == 1
  jax.tree.map(
    np.testing.assert_array_equal,
    run.variables,
    testing.random_state(CONFIG).variables(),
  )
  logits_BTV = jax.eval_shape(
    run.model.apply, run.variables, np.zeros((1, 3), np.int32)
  )
  assert logits_BTV.shape == (1, 3, CONFIG.model.vocab_size)


@pytest.mark.parametrize(
  ("arguments", "error", "expected"),
  [
    (
      dict(step="last"),
      ConfigError,
      "step = 'last': must be newest, best, or the number of a step",
    ),
    (dict(step=-1), ConfigError, "step = -1: must be newest, best, or"),
    (dict(step="8"), CheckpointError, "saved: 7"),
    (dict(mesh={"table": 2}), ConfigError, "mesh.data = -1: fsdp * tensor"),
    (dict(mesh={"tabel": 2}), ConfigError, "mesh.tabel = 2: no such field"),
  ],
)
def test_what_is_not_there_is_refused(workdir, arguments, error, expected):
  with pytest.raises(error) as caught:
    load_lib.load(workdir, **arguments)
  assert expected in str(caught.value)


def test_best_is_the_step_of_least_loss(tmp_path):
  config = testing.small_config(model__num_layers=1, model__memory__kind="none")
  testing.save_run(tmp_path, config)
  items = testing.random_state(config).to_items()
  with checkpoint.Checkpointer(tmp_path, 3) as saver:
    for step, loss in ((8, 2.0), (9, 3.0)):
      saver.save(step, items, {}, loss)
  assert load_lib.load(tmp_path, "best").step == 8
  assert load_lib.load(tmp_path).step == 9
