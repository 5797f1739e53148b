"""Tests of training with the sparse update of value tables."""

import functools

import jax
import numpy as np
import pytest

from tests.train import small_steps
from ultramem_jax.runs import checkpoint
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close
from ultramem_jax.train import optim
from ultramem_jax.train import state as state_lib

SUM = {
  "model__memory__score": "sum",
  "model__memory__softmax": True,
  "model__memory__num_cores": 1,
  "model__memory__init": "official",
  "model__memory__expansion": 1,
  "model__memory__query_conv": 0,
}
TWO = {"model__num_layers": 2, "model__memory__spans": "full"}
KINDS = {
  "ultramem": {},
  "memory_plus": {
    **SUM,
    **TWO,
    "model__memory__kind": "memory_plus",
    "model__memory__heads_per_query": 1,
    "model__memory__shuffle": "none",
    "model__remat": "block",
  },
  "ultramem_v2": {
    **TWO,
    "model__memory__kind": "ultramem_v2",
    "model__memory__init": "official",
    "model__memory__pre_value_dim": 4,
    "model__memory__shared_projection": False,
  },
  "peer": {
    **SUM,
    "model__memory__kind": "peer",
    "model__memory__value_dim": 16,
    "model__memory__value_projection": False,
  },
}
LOW = {
  "model__memory__storage__table_dtype": "bfloat16",
  "optim__table_moments": "bfloat16",
  "optim__table_second_moment": "row",
}


def make_config(**overrides):
  return small_steps.make_config(**{**small_steps.SPARSE_SETTINGS, **overrides})


def go_on(config, state, seeds):
  """(states, metrics) of steps from a state on."""
  states, records = [], []
  state = jax.device_put(state)
  for seed in seeds:
    state, metrics = small_steps.train_program(config)(
      state, small_steps.make_batch(config, seed=seed)
    )
    states.append(jax.device_get(state))
    records.append(jax.device_get(metrics))
  return states, records


@functools.cache
def run(config, steps=2):
  """(states, metrics) of the first state and of every step."""
  start = jax.device_get(small_steps.first_state(config))
  states, records = go_on(config, start, range(steps))
  return [start, *states], records


@pytest.mark.parametrize("kind", KINDS)
def test_first_step_equals_the_dense_one_on_the_rows_read(kind):
  config = make_config(**KINDS[kind])
  (_, sparse, _), (records, _) = run(config)
  dense_config = make_config(optim__table_update="dense", **KINDS[kind])
  (start, dense), (expected,) = run(dense_config, 1)
  assert set(records) == set(expected)
  assert records["gradient_norm"] > 0.1  # it is clipped
  for name in expected:
    np.testing.assert_allclose(
      records[name], expected[name], rtol=1e-5, err_msg=name
    )
  change = lambda new, old: jax.tree.map(np.subtract, new, old)
  # Adam divides a gradient by its size: where it is near 0, its rounding shows.
  assert_close(
    change(sparse.params, start.params),
    change(dense.params, start.params),
    tolerance=1e-3,
  )
  assert set(sparse.tables) == set(dense.tables) and dense.tables
  for path, old in start.tables.items():
    table, wanted = sparse.tables[path], dense.tables[path]
    assert_close(table[1:], wanted[1:])
    read_I = (table.nu > 0).any(1)
    assert 0 < read_I.mean() < 1
    assert_close(
      (table.values_IW - old.values_IW)[read_I],
      (wanted.values_IW - old.values_IW)[read_I],
    )


def test_rows_not_read_stay_as_they_are():
  config = make_config()
  (start, first, second), _ = run(config)
  tables = [state.tables["memory_0/values"] for state in (start, first, second)]
  old, new = tables[0].values_IW, tables[1].values_IW
  read_I = (tables[1].nu > 0).any(1)
  changed_I = (old != new).any(1)
  # What padding reads does not count, neither as usage nor here.
  usage_I = first.usage["memory_0"].slots.reshape(-1, len(old)).sum(0)
  np.testing.assert_array_equal(changed_I, usage_I > 0)
  assert changed_I[read_I].all() and not changed_I.all()
  # Of the rows of the first step, the second read some but not all.
  same_I = (tables[1].mu_IW == tables[2].mu_IW).all(1)
  assert (read_I & same_I).any() and (read_I & ~same_I).any()


def test_accumulated_step_equals_one_step():
  whole, metrics = run(make_config(**KINDS["ultramem_v2"]))
  parts, sums = run(
    make_config(accumulation_steps=2, **KINDS["ultramem_v2"]), 1
  )
  moments = lambda state: [table[1:] for table in state.tables.values()]
  assert_close(moments(parts[1]), moments(whole[1]))
  for name in ("loss", "gradient_norm"):
    np.testing.assert_allclose(sums[0][name], metrics[0][name], rtol=1e-5)


@pytest.mark.parametrize("overrides", [{}, LOW], ids=["float32", "bfloat16"])
def test_going_on_from_a_checkpoint_gives_the_same_bits(overrides, tmp_path):
  config = make_config(**overrides)
  (_, first, second), metrics = run(config)
  with checkpoint.Checkpointer(tmp_path, keep=1) as checkpointer:
    checkpointer.save(1, jax.device_put(first).to_items(), {})
    checkpointer.wait()
    restored = checkpointer.restore_latest(first.to_items())
  state = state_lib.TrainState.from_items(restored.items, "all")
  states, records = go_on(config, state, [1])
  small_steps.assert_same_bits((states[0], records[0]), (second, metrics[1]))


def test_low_precision_tables_train():
  config = make_config(**LOW)
  start = small_steps.first_state(config)
  table = start.tables["memory_0/values"]
  assert table.values_IW.dtype == table.mu_IW.dtype == np.uint16
  assert table.nu.shape == table.values_IW.shape[:1]
  _, records = go_on(config, start, [0] * 30)
  assert records[-1]["loss"] < 0.6 * records[0]["loss"]
  # The same start, but for the rounding of the table.
  np.testing.assert_allclose(
    records[0]["loss"], run(make_config())[1][0]["loss"], rtol=1e-2
  )


def test_auto_is_sparse_where_few_rows_are_read():
  # 4 sequences of 8 tokens, 3 rows for each of 2 heads.
  config = make_config(optim__table_update="auto", model__memory__num_keys=32)
  assert optim.reads_per_row(config) == 4 * 8 * 3 * 2 / 32**2
  assert optim.updates_rows(config)
  assert "sparse" in optim.describe_table_update(config)
  for overrides, expected in (
    ({"model__memory__num_keys": 8}, False),
    (LOW, True),
    ({"model__memory__kind": "none", "model__memory__spans": ""}, False),
  ):
    config = make_config(**{"optim__table_update": "auto", **overrides})
    assert optim.updates_rows(config) == expected


@pytest.mark.parametrize("field", LOW)
def test_low_precision_needs_the_sparse_update(field):
  with pytest.raises(ConfigError, match=r"optim\.table_update"):
    make_config(optim__table_update="dense", **{field: LOW[field]})


def test_rows_that_only_storage_has_are_neither_read_nor_updated():
  """With four blocks apart by I; on a ring of two memories, around its end."""
  config = make_config(**KINDS["ultramem_v2"])
  padded = make_config(
    **KINDS["ultramem_v2"], model__memory__storage__row_multiple=100
  )
  rows = config.model.memory.num_rows
  assert (rows, padded.model.memory.stored_rows) == (512, 600)

  def parts(state, part):
    """Weights, and rows of the tables and their moments."""
    return state.params, jax.tree.map(lambda x: x[part], state.tables)

  (_, *expected), expected_records = run(config)
  (start, *states), records = run(padded)
  assert_close(records, expected_records)
  for state, wanted in zip(states, expected, strict=True):
    every = slice(None)
    assert_close(parts(state, slice(rows)), parts(wanted, every))
    jax.tree.map(
      lambda x, y: np.testing.assert_array_equal(x, y[: x.size]),
      wanted.usage,
      state.usage,
    )
    beyond = slice(rows, None)
    small_steps.assert_same_bits(
      parts(state, beyond)[1:], parts(start, beyond)[1:]
    )
