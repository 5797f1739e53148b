"""The accounting against closed forms and the paper's figures."""

import functools
import importlib
import json

import jax
import numpy as np
import pytest

from configs import tiny
from ultramem_jax import Transformer
from ultramem_jax.settings import config
from ultramem_jax.tools import accounting


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


def test_grouped_heads_and_biases():
  c = small()
  c.model.update(num_heads=6, num_kv_heads=2, head_dim=8, qkv_bias=True)
  c.model.update(qk_norm="width")
  model = config.parse(c).model
  queries, keys = 6 * 8, 2 * 8
  attention = 24 * (2 * queries + 2 * keys) + queries + 2 * keys
  assert accounting.flops_per_token(model)["attention"] == 2 * 4 * attention
  plain = accounting.parameters(config.parse(small()).model)
  counts = accounting.parameters(model)
  assert counts == plain | {
    "dense": plain["dense"] + 4 * (attention - 4 * 24**2),
    "norm": plain["norm"] + 4 * (queries + keys),
  }
  token_BT = np.zeros((1, 1), np.int32)
  shapes = jax.eval_shape(Transformer(model).init, jax.random.key(0), token_BT)
  sizes = [x.size for x in jax.tree.leaves(shapes["params"])]
  assert sum(counts.values()) == sum(sizes)


def test_convolutions_before_mlps_are_dense_parameters():
  c = small()
  before = accounting.parameters(config.parse(c).model)
  c.model.update(mlp_conv=3, mlp_conv_blocks="1/4")
  model = config.parse(c).model
  after = accounting.parameters(model)
  assert after == {**before, "dense": before["dense"] + 2 * 3 * 24}
  assert accounting.flops_per_token(model)["mlp_conv"] == 2 * 2 * 3 * 24


def test_adapters_are_dense_parameters_that_every_token_reads():
  c = small()
  plain = config.parse(c).model
  c.model.update(adapter_dim=6, adapter_blocks="1/4")
  model, added = config.parse(c).model, 2 * 2 * 24 * 6
  before, after = map(accounting.parameters, (plain, model))
  assert after == {**before, "dense": before["dense"] + added}
  assert accounting.flops_per_token(model)["adapter"] == 2 * added
  access = accounting.memory_access(plain, batch=16)
  assert accounting.memory_access(model, batch=16) == access + added


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


def test_report_is_plain_json_and_summary_shows_it():
  model = load("151m_x12").model
  costs = json.loads(json.dumps(accounting.report(model, batches=(64,))))
  assert costs["params"]["dense"] == 173_573_808
  assert costs["params"]["sparse"] == 1_858_560_000
  assert costs["params"]["embedding"] == 2 * 50_432 * 1024
  assert costs["flops_per_token"] == 347_405_664
  assert costs["memory_access"] == {"64": 108_920_832}
  for text in (accounting.summary(model), accounting.headline(model)):
    for number in ("173,573,808", "1,858,560,000", "347,405,664"):
      assert number in text
