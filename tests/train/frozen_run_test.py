"""Runs that keep most parameters as they are, and save those once."""

import dataclasses
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from ultramem_jax import testing
from ultramem_jax.runs import checkpoint, step_dirs
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.serve import load as load_lib
from ultramem_jax.settings.errors import ConfigError, TargetError
from ultramem_jax.tools import fit, training
from ultramem_jax.train import init_from, sharding, start
from ultramem_jax.train import program as program_lib
from ultramem_jax.train import state as state_lib

SIZES = {"model__num_layers": 2, "optim__table_update": "dense"}
BACKBONE = testing.small_config(**SIZES, model__memory__kind="none")


def flat(tree) -> dict[str, Any]:
  return traverse_util.flatten_dict(tree, sep="/")


def make_config(source, **overrides):
  return testing.small_config(
    **{
      **SIZES,
      "model__memory__spans": "2:2",
      "optim__trainable": "memory",
      "init_from": str(source),
      "steps": 4,
      "checkpoint__every": 2,
      "checkpoint__keep": 5,
      "sample__num_tokens": 0,
      **overrides,
    }
  )


@pytest.fixture(scope="module")
def text(tmp_path_factory):
  path = tmp_path_factory.mktemp("text") / "text.txt"
  path.write_text("".join(chr(97 + i * i % 26) for i in range(600)))
  return {
    "data__source": "text",
    "data__path": str(path),
    "data__valid_path": str(path),
  }


@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory):
  """(config, workdir) of a run of four steps, whose source is gone."""
  folder = tmp_path_factory.mktemp("runs")
  testing.save_run(folder / "source", BACKBONE)
  config = make_config(folder / "source", **text)
  assert training.train(config, str(folder / "run"))
  shutil.rmtree(folder / "source")
  return config, folder / "run"


def restored(config, workdir, **options):
  layout = program_lib.one_device(config)
  items = state_lib.abstract_state(config, layout).to_items()
  with checkpoint.Checkpointer(workdir, 5) as saver:
    found = saver.restore_latest(items, **options)
  assert found and found.step == config.steps
  return found.items


def test_a_run_goes_on_without_its_source_to_the_same_bits(unbroken, tmp_path):
  config, workdir = unbroken
  run = tmp_path / "run"
  shutil.copytree(workdir, run)
  shutil.rmtree(run / "checkpoints" / "4")
  assert training.train(config, str(run))
  one, other = (restored(config, x) for x in (run, workdir))
  testing.assert_close(one, other, tolerance=0)
  metrics = [x / "metrics.jsonl" for x in (run, workdir)]
  assert metrics[0].read_bytes() == metrics[1].read_bytes()
  assert [x.name for x in (run / "frozen").iterdir()] == ["1"]


def test_checkpoints_hold_what_is_trained(unbroken):
  config, workdir = unbroken
  state = state_lib.abstract_state(config, program_lib.one_device(config))
  trained = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  trained -= sum(
    x.size * x.dtype.itemsize for x in jax.tree.leaves(state.frozen)
  )
  for step in ("2", "4"):
    path = workdir / "checkpoints" / step
    names = step_dirs.facts(path)["arrays"]
    assert not any(x.startswith("params/block_") for x in names)
    # Beside the arrays, Orbax writes what they are.
    written = sum(x.stat().st_size for x in path.rglob("*") if x.is_file())
    assert written < trained + 60_000
  # Serving reads both.
  loaded = flat(load_lib.load(workdir).variables["params"])
  held = flat(testing.random_state(BACKBONE).params)
  assert held.keys() < loaded.keys()
  for path, x in held.items():
    np.testing.assert_array_equal(loaded[path], x)


def test_others_are_trained_from_a_step_on(unbroken, tmp_path):
  """Their moments begin at zero; those of what is trained no more are gone."""
  config, workdir = unbroken
  run = tmp_path / "run"
  shutil.copytree(workdir, run)
  other = dataclasses.replace(
    config,
    optim=dataclasses.replace(config.optim, trainable="memory.*query|head"),
  )
  corpus = workdir_lib.load_corpus(run)
  with pytest.raises(ConfigError, match="or --override to go on with the new"):
    workdir_lib.claim(run, other, corpus)
  held = restored(config, run)
  assert not workdir_lib.is_overridden(run, "optim.trainable")
  workdir_lib.claim(run, other, corpus, override=True)
  assert workdir_lib.is_overridden(run, "optim.trainable")
  with pytest.raises(TargetError, match="missing there: rest/opt_state/"):
    restored(other, run)
  found = restored(other, run, fresh=start.MOMENTS)
  testing.assert_close(found["params"], held["params"], tolerance=0)
  mu, before = (flat(x["rest"].opt_state[1].mu) for x in (found, held))
  assert "head/kernel" in mu and "memory_0/value_projection" not in mu
  np.testing.assert_array_equal(mu["memory_0/query"], before["memory_0/query"])
  assert not any(np.any(x) for k, x in mu.items() if k.startswith("head"))
  assert found["rest"].tables == {} and held["rest"].tables


def narrow(config, **optim):
  held = dataclasses.replace(
    config.optim, **{"frozen_dtype": "bfloat16", **optim}
  )
  return dataclasses.replace(config, optim=held)


def test_frozen_parameters_in_half_the_bytes(text, tmp_path):
  config, run = make_config("", **text), tmp_path / "run"
  wide, half = (
    flat(state_lib.abstract_state(c, program_lib.one_device(c)).frozen)
    for c in (config, narrow(config))
  )
  saved = {path for path in wide if half[path].dtype == jnp.bfloat16}
  assert any("mlp" in x for x in saved)
  assert not any("norm" in x or "memory" in x for x in saved)
  needs = [
    fit.training_bytes(c)["parameters"] for c in (config, narrow(config))
  ]
  assert needs[0] - needs[1] == sum(2 * wide[path].size for path in saved)
  testing.save_run(run, narrow(config))
  loaded = load_lib.load(run)
  params = flat(loaded.variables["params"])
  assert {x for x in params if params[x].dtype == jnp.bfloat16} == saved
  # The model computes in its own dtype: as if they were float32.
  tokens_BT = np.arange(14, dtype=np.int32).reshape(2, 7)
  apply = jax.jit(loaded.model.apply)
  whole = jax.tree.map(
    lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x,
    loaded.variables,
  )
  testing.assert_close(
    apply(loaded.variables, tokens_BT), apply(whole, tokens_BT), tolerance=1e-6
  )
  # What was rounded is not trained from there; a new run may take it.
  other = narrow(config, trainable="all")
  with pytest.raises(ConfigError, match=r"with init_from = '.*run' for its pa"):
    workdir_lib.claim(run, other, "some text", override=True)
  again = dataclasses.replace(config, init_from=str(run))
  layout = program_lib.one_device(again)
  fresh = testing.random_state(again).variables()
  fresh = jax.device_put(fresh, sharding.replicated(layout.mesh))
  taken = init_from.load(init_from.plan(again), fresh, layout.mesh)
  testing.assert_close(taken["params"], whole["params"], tolerance=0)
