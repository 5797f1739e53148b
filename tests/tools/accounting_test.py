"""The accounting against closed forms, the paper's figures, and real bytes."""

import functools
import importlib
import json
import subprocess
import sys

import jax
import pytest

from configs import tiny, tiny_dense
from ultramem_jax.settings import config
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.tools import accounting
from ultramem_jax.train import state as state_lib
from ultramem_jax.train import step as step_lib


@functools.cache
def load(name):
  return config.parse(importlib.import_module(f"configs.{name}").get_config())


def small(**fields):
  """A run of odd sizes: (config, its memory section)."""
  c = tiny.get_config()
  c.model.update(vocab_size=300, embed_dim=24, num_heads=2, mlp_dim=40)
  c.model.memory.update(
    num_keys=9, key_dim=5, value_dim=14, top_m=7, num_heads=3, heads_per_query=3
  )
  c.update(fields)
  return c


def test_parameters_equal_the_closed_forms():
  model = config.parse(small()).model
  layers, memories = 4, 2
  keys = 2 * 3 * 2 * (2 * 9) * 5  # sides, heads, ranks, sqrt(E) n, width
  query = 24 * 2 * 2 * 5  # one query for three heads, per rank
  core = 2 * 3 * 2 * 2
  memory = keys + query + core + 5 * 24 + 4 * 14 * 24
  norms = layers * 2 * 24 + 24 + memories * 2 * 5
  assert accounting.parameters(model) == {
    "dense": layers * (4 * 24**2 + 2 * 24 * 40) + memories * memory,
    "sparse": memories * 81 * 14,
    "embedding": 2 * 300 * 24,
    "norm": norms,
  }


def test_flops_by_part_equal_the_closed_forms():
  model = config.parse(small()).model
  assert accounting.flops_per_token(model) == {
    "attention": 2 * 4 * 4 * 24**2,
    "mlp": 2 * 4 * 2 * 24 * 40,
    "memory.keys": 2 * 2 * 2 * 3 * 2 * 18 * 5,
    "memory.query": 2 * 2 * 24 * 2 * 2 * 5,
    "memory.core": 2 * 2 * 2 * 3 * 4,
    "memory.query_conv": 2 * 2 * 5 * 24,
    "memory.value_projection": 2 * 2 * 4 * 14 * 24,
    "memory.values": 2 * 2 * 7 * 3 * 14,
  }


def test_experts_count_in_full_and_cost_what_is_active():
  c = small()
  c.model.memory.kind = "none"
  c.model.moe.update(num_experts=6, top_k=3, expert_dim=10)
  model = config.parse(c).model
  counts = accounting.parameters(model)
  assert counts["sparse"] == 4 * 6 * 2 * 24 * 10
  assert counts["dense"] == 4 * (4 * 24**2 + 24 * 6)
  flops = accounting.flops_per_token(model)
  assert flops["moe.experts"] == 2 * 4 * 3 * 2 * 24 * 10
  assert flops["moe.router"] == 2 * 4 * 24 * 6
  for batch, used in ((1, 3), (2, 6), (50, 6)):
    assert accounting.memory_access(model, batch) == 4 * used * 2 * 24 * 10


def test_tied_embeddings_and_gated_mlps():
  c = small()
  c.model.update(tie_embeddings=True, activation="swiglu", norm="rms")
  model = config.parse(c).model
  assert accounting.parameters(model)["embedding"] == 300 * 24
  assert accounting.flops_per_token(model)["mlp"] == 2 * 4 * 3 * 24 * 40


@pytest.mark.parametrize("name", ["1b6_dense", "1b6_moe_2in34", "1b6_x12"])
@pytest.mark.parametrize("batch", [1, 16, 64, 256, 1024, 100_000])
def test_memory_access_equals_the_closed_forms(name, batch):
  dense = 32 * 2 * 2048 * 8192
  rows = min(batch * 42 * 2, 1789**2)
  expected = {
    "1b6_dense": dense,
    "1b6_moe_2in34": 32 * min(2 * batch, 34) * 2 * 2048 * 4672,
    "1b6_x12": dense + 6 * rows * 1024,
  }
  actual = accounting.memory_access(load(name).model, batch)
  assert actual == expected[name]


def test_memory_access_ratios_of_figure_1():
  ratios = [
    accounting.memory_access(load("1b6_moe_2in34").model, batch)
    / accounting.memory_access(load("1b6_x12").model, batch)
    for batch in (16, 64, 256, 1024)
  ]
  printed = [f"{ratio:.3f}" for ratio in ratios]
  assert printed == ["18.111", "18.812", "17.266", "12.995"]


def test_a_token_never_reads_more_than_the_table():
  model = config.parse(small()).model
  mlp = 4 * 2 * 24 * 40
  # 21 rows a token of a table of 81.
  for batch, rows in ((1, 21), (3, 63), (4, 81), (1000, 81)):
    assert accounting.memory_access(model, batch) == mlp + 2 * rows * 14


def bytes_of(tree):
  """Of the arrays of numbers in a tree, its counters apart."""
  return sum(
    leaf.size * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
    if leaf.dtype != "int32"
  )


def test_state_bytes_equal_those_of_the_real_state():
  run = config.parse(small())
  state = jax.eval_shape(functools.partial(state_lib.init_state, run))
  counted = accounting.training_bytes(run)
  assert counted["parameters"] == bytes_of(state.params)
  assert counted["optimizer"] == bytes_of(state.opt_state)
  assert counted["gradients"] == bytes_of(state.params)
  assert counted.pop("total") == sum(counted.values())


@pytest.mark.parametrize("moment", ["element", "row"])
def test_state_bytes_of_low_precision_tables(moment):
  c = small()
  c.model.memory.table_dtype = c.optim.table_moments = "bfloat16"
  c.optim.table_second_moment = moment
  run = config.parse(c)
  state = jax.eval_shape(functools.partial(state_lib.init_state, run))
  counted = accounting.training_bytes(run)
  assert counted["parameters"] == bytes_of(state.params)
  assert counted["optimizer"] == bytes_of((state.opt_state, state.moments))
  rest = state.split_tables()[0].params
  factors = accounting.factor_bytes(run)
  assert counted["gradients"] == bytes_of(rest) + factors
  assert factors > 0


@pytest.mark.parametrize("parts", [1, 2])
def test_slots_of_all_parts_are_counted(parts):
  run = config.parse(small(accumulation_steps=parts))
  state = jax.eval_shape(functools.partial(state_lib.init_state, run))
  batch = step_lib.abstract_batch(run)
  total = jax.ShapeDtypeStruct((), "float32")
  _, (_, _, slots, _) = jax.eval_shape(
    functools.partial(step_lib.loss_fn, config=run),
    state.params,
    state.buffers,
    batch,
    jax.random.key(0),
    total,
  )
  count = sum(slot_BTAM.size for slot_BTAM in slots.values())
  assert accounting.training_bytes(run)["slots"] == 4 * count > 0
  four = accounting.training_bytes(run, num_devices=4)
  assert four["slots"] == count


def test_activations_shrink_with_devices_and_parts():
  whole = accounting.training_bytes(config.parse(small()))
  split = accounting.training_bytes(config.parse(small()), num_devices=4)
  parts = accounting.training_bytes(config.parse(small(accumulation_steps=2)))
  assert whole["activations"] == 4 * split["activations"]
  assert whole["activations"] == 2 * parts["activations"]
  assert split["gradients"] == whole["gradients"]
  assert parts["gradients"] == 2 * whole["gradients"]  # the sum, and a part's


def test_estimate_is_near_what_xla_compiles():
  c = tiny_dense.get_config()
  run = config.parse(c)
  state = jax.eval_shape(functools.partial(state_lib.init_state, run))
  step = step_lib.jitted(step_lib.train_step, run, donate_argnums=0)
  memory = step.lower(state, step_lib.abstract_batch(run)).compile()
  memory = memory.memory_analysis()
  estimate = accounting.training_bytes(run)
  assert memory.argument_size_in_bytes == pytest.approx(
    estimate["parameters"] + estimate["optimizer"], rel=0.02
  )
  assert memory.temp_size_in_bytes == pytest.approx(
    estimate["gradients"] + estimate["activations"], rel=0.25
  )


def test_24_gib_refuse_the_full_model_and_take_a_shrunk_one(monkeypatch):
  monkeypatch.setattr(accounting, "available_bytes", lambda: 24 * 2**30)
  full = importlib.import_module("configs.151m_x12").get_config()
  full.batch_size = 1
  full.data.seq_len = 128
  with pytest.raises(ConfigError) as error:
    accounting.check_memory(config.parse(full))
  message = str(error.value)
  assert "\n" not in message
  # 12 bytes for each of 1.859 G values, 16 for the others; no dense gradient.
  assert "26.7 GB" in message
  assert "25.8 GB" in message
  full.model.memory.num_keys = 128
  accounting.check_memory(config.parse(full))


def test_unknown_memory_refuses_nothing(monkeypatch):
  monkeypatch.setattr(accounting, "available_bytes", lambda: None)
  accounting.check_memory(load("1b6_x12"))


def test_available_bytes_of_this_machine():
  available = accounting.available_bytes()
  assert available is None or 2**20 < available < 2**50


def test_control_group_and_free_memory_limit_the_host(tmp_path):
  meminfo = tmp_path / "proc/meminfo"
  version_1 = tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes"
  version_2 = tmp_path / "sys/fs/cgroup/memory.max"
  for path in (meminfo, version_1):
    path.parent.mkdir(parents=True)
  assert accounting.host_bytes(tmp_path) > 2**20  # physical memory
  meminfo.write_text("MemTotal: 9 kB\nMemAvailable:   4000 kB\n")
  assert accounting.host_bytes(tmp_path) == 4000 * 1024
  version_2.write_text("max\n")
  assert accounting.host_bytes(tmp_path) == 4000 * 1024
  version_2.write_text("3000000\n")
  assert accounting.host_bytes(tmp_path) == 3_000_000
  version_1.write_text("2000000\n")
  assert accounting.host_bytes(tmp_path) == 2_000_000


def test_report_is_plain_json_and_summary_shows_it():
  run = load("151m_x12")
  costs = json.loads(json.dumps(accounting.report(run, batches=(64,))))
  assert costs["params"]["dense"] == 173_573_808
  assert costs["params"]["sparse"] == 1_858_560_000
  assert costs["params"]["embedding"] == 2 * 50_432 * 1024
  assert costs["flops_per_token"] == 347_405_664
  assert costs["memory_access"] == {"64": 108_920_832}
  text = accounting.summary(run)
  for number in ("173,573,808", "1,858,560,000", "347,405,664"):
    assert number in text


def test_command_line_prints_json():
  command = [
    sys.executable,
    "-m",
    "ultramem_jax",
    "accounting",
    "--json",
    "--batch=64",
    "--config=configs/tiny.py",
    "--config.model.memory.kind=none",
  ]
  printed = subprocess.run(command, check=True, capture_output=True, text=True)
  costs = json.loads(printed.stdout)
  assert costs["params"]["sparse"] == 0
  assert costs["memory_access"] == {"64": 4 * 2 * 128 * 512}
