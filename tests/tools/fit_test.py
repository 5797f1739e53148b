"""Estimates of memory against real and compiled bytes, and the verdict."""

import functools
import importlib

import jax
import pytest
from flax import traverse_util

from configs import tiny_dense
from ultramem_jax import testing
from ultramem_jax.settings import config
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.tools import accounting, device_memory, fit
from ultramem_jax.train import state as state_lib
from ultramem_jax.train import step as step_lib
from ultramem_jax.train.program import TrainProgram


def bytes_of(tree):
  """Of the arrays of numbers in a tree, its counters apart."""
  return sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if leaf.dtype != "int32"
  )


def test_state_bytes_equal_those_of_the_real_state():
  run = testing.small_config()
  state = jax.eval_shape(functools.partial(state_lib.init_state, run))
  counted = fit.training_bytes(run)
  params = state.variables()["params"]
  moments = [table[1:] for table in state.tables.values()]
  assert counted["parameters"] == bytes_of(params)
  assert counted["optimizer"] == bytes_of((state.opt_state, moments))
  assert counted["gradients"] == bytes_of(params)
  assert counted.pop("total") == sum(counted.values())


@pytest.mark.parametrize("moment", ["element", "row"])
def test_state_bytes_of_low_precision_tables(moment):
  run = testing.small_config(
    model__memory__storage__table_dtype="bfloat16",
    optim__table_moments="bfloat16",
    optim__table_second_moment=moment,
  )
  state = jax.eval_shape(functools.partial(state_lib.init_state, run))
  counted = fit.training_bytes(run)
  moments = [table[1:] for table in state.tables.values()]
  assert counted["parameters"] == bytes_of(state.variables()["params"])
  assert counted["optimizer"] == bytes_of((state.opt_state, moments))
  factors = fit.factor_bytes(run)
  assert counted["gradients"] == bytes_of(state.params) + factors
  assert factors > 0


def test_tables_without_moments_or_gradients_take_neither():
  plain = testing.small_config(optim__table_update="dense")
  sgd = testing.small_config(
    optim__table_update="dense", optim__table_rule="sgd"
  )
  state = jax.eval_shape(functools.partial(state_lib.init_state, sgd))
  moments = [table[1:] for table in state.tables.values()]
  held = bytes_of((state.opt_state, moments))
  assert fit.training_bytes(sgd)["optimizer"] == held
  assert held < fit.training_bytes(plain)["optimizer"]
  frozen = testing.small_config(
    optim__table_update="sparse", optim__trainable="/mlp/"
  )
  params = jax.eval_shape(
    functools.partial(state_lib.init_state, frozen)
  ).params
  flat = traverse_util.flatten_dict(params, sep="/")
  mlp = {k: v for k, v in flat.items() if "/mlp/" in k}
  assert fit.training_bytes(frozen)["gradients"] == bytes_of(mlp)


def test_each_device_has_the_factors_of_the_whole_batch():
  run = testing.small_config(optim__table_update="sparse")
  one, four = (fit.training_bytes(run, n)["gradients"] for n in (1, 4))
  assert four == one > fit.factor_bytes(run) > 0
  peer = testing.small_config(
    optim__table_update="sparse",
    model__memory__kind="peer",
    model__memory__value_dim=run.model.embed_dim,
  )
  assert len(accounting.table_widths(peer.model)) == 2


@pytest.mark.parametrize("parts", [1, 2])
def test_slots_of_all_parts_are_counted(parts):
  run = testing.small_config(batch_size=8, accumulation_steps=parts)
  state = jax.eval_shape(functools.partial(state_lib.init_state, run))
  batch = step_lib.abstract_batch(run)
  total = jax.ShapeDtypeStruct((), "float32")
  _, aux = jax.eval_shape(
    functools.partial(step_lib.loss_fn, config=run),
    state.variables(),
    batch,
    jax.random.key(0),
    total,
  )
  count = sum(slot_BTAM.size for slot_BTAM in aux["slots"].values())
  assert fit.training_bytes(run)["slots"] == 4 * count > 0
  four = fit.training_bytes(run, num_devices=4)
  assert four["slots"] == count


def test_activations_shrink_with_devices_and_parts():
  whole = fit.training_bytes(testing.small_config())
  split = fit.training_bytes(testing.small_config(), num_devices=4)
  parts = fit.training_bytes(testing.small_config(accumulation_steps=2))
  assert whole["activations"] == 4 * split["activations"]
  assert whole["activations"] == 2 * parts["activations"]
  assert split["gradients"] == whole["gradients"]
  assert parts["gradients"] == 2 * whole["gradients"]  # the sum, and a part's


def test_estimate_is_near_what_xla_compiles(platform):
  run = config.parse(tiny_dense.get_config())
  memory = TrainProgram(run).programs["train"].memory_analysis()
  estimate = fit.training_bytes(run, platform=platform)
  assert memory.argument_size_in_bytes == pytest.approx(
    estimate["parameters"] + estimate["optimizer"], rel=0.02
  )
  assert memory.temp_size_in_bytes == pytest.approx(
    estimate["gradients"] + estimate["activations"], rel=0.25
  )


def test_a_cpu_is_not_refused_what_it_holds():
  """Long rows, whose scores an accelerator keeps for all blocks."""
  c = tiny_dense.get_config()
  c.update(batch_size=1)
  c.data.seq_len = 1024
  run = config.parse(c)
  held = TrainProgram(run).programs["train"].memory_analysis()
  need = fit.training_bytes(run, platform="cpu")
  assert need["gradients"] + need["activations"] < held.temp_size_in_bytes
  assert need["activations"] < 0.5 * fit.training_bytes(run)["activations"]


def test_24_gib_refuse_the_full_model_and_take_a_shrunk_one(monkeypatch):
  monkeypatch.setattr(device_memory, "available_bytes", lambda: 24 * fit.GIB)
  full = importlib.import_module("configs.151m_x12").get_config()
  full.batch_size = 1
  full.data.seq_len = 128
  with pytest.raises(ConfigError) as error:
    fit.check(config.parse(full))
  message = str(error.value)
  assert "\n" not in message
  # 12 bytes for each of 1.859 G values, 16 for the others; no dense gradient.
  assert "fits 24 GiB: no, needs 24.96 GiB" in message
  assert "(24.9 GiB for parameters, gradients" in message
  full.model.memory.num_keys = 128
  fit.check(config.parse(full))


def test_unknown_memory_refuses_nothing(monkeypatch):
  monkeypatch.setattr(device_memory, "available_bytes", lambda: None)
  run = importlib.import_module("configs.1b6_x12").get_config()
  assert "the memory of this device is unknown" in fit.check(config.parse(run))


@pytest.mark.parametrize(
  ("need", "have", "expected"),
  [
    (85.312 * 2**30, 80 * 2**30, "fits 80 GiB: no, needs 85.31 GiB"),
    (8 * 2**20, 15.75 * 2**30, "fits 15.75 GiB: yes, needs 0.007812 GiB"),
    (2**30, 2**30, "fits 1 GiB: yes, needs 1 GiB"),
    (2**31, None, "needs 2 GiB; the memory of this device is unknown"),
  ],
)
def test_verdict(need, have, expected):
  assert fit.verdict(need, have) == expected


def test_a_compiled_step_that_needs_more_is_refused(monkeypatch):
  run = testing.small_config()
  monkeypatch.setattr(device_memory, "available_bytes", lambda: 2 * fit.GIB)
  fit.check_compiled(run, 2 * fit.GIB)
  with pytest.raises(ConfigError, match=r"fits 2 GiB: no, needs 3 GiB: reduce"):
    fit.check_compiled(run, 3 * fit.GIB)


def test_an_evaluation_whose_logits_do_not_fit_is_refused(monkeypatch):
  config = testing.small_config(batch_size=16, data__seq_len=8)
  size = 4 * 16 * 8 * config.model.vocab_size
  monkeypatch.setattr(device_memory, "available_bytes", lambda: size)
  fit.check_evaluation(config, 1)
  monkeypatch.setattr(device_memory, "available_bytes", lambda: size - 1)
  with pytest.raises(ConfigError, match="batch_size = 16: memory per device"):
    fit.check_evaluation(config, 1)
  fit.check_evaluation(config, 2)
