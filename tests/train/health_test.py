"""How tables are used and fare: counted by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import small_steps
from ultramem_jax.train import health
from ultramem_jax.train.usage import Reads


def reported(state, config):
  state, metrics = health.report(state, config=config)
  return state, {
    name.removeprefix("memory_0/"): float(value)
    for name, value in metrics.items()
  }


@pytest.mark.parametrize("row_multiple, counters", [(1, 16), (3, 18)])
def test_reads_by_hand(row_multiple, counters):
  # Four rows in two blocks: slots 0-3 read rows 0-3, slots 4-7 again.
  config = small_steps.make_config(
    model__memory__num_keys=2,
    model__memory__expansion=4,
    model__memory__top_m=2,
    model__memory__storage__row_multiple=row_multiple,
  )
  usage_U = np.zeros(counters, np.int32)
  usage_U[[0, 4, 1, 9]] = 3, 1, 2, 2  # row 0: 3 + 1, row 1: 2 + 2
  usage_K = np.array([5, 0, 1, 0, 0, 0, 0, 0], np.int32)
  seen_U = np.zeros(counters, bool)
  seen_U[[1, 3]] = True
  state = small_steps.first_state().replace(
    usage={"memory_0": Reads(jnp.asarray(usage_U), jnp.asarray(usage_K))},
    seen={"memory_0": Reads(jnp.asarray(seen_U), jnp.zeros(8, bool))},
    tables={},
  )
  state, metrics = reported(state, config)
  assert metrics == {
    "coverage": 2 / 4,
    "coverage_virtual": 4 / 16,
    # sum of p log(p / (1 / 4)) with p = 1 / 2 twice
    "usage_kl": pytest.approx(np.log(2)),
    "rows_never_read": 1 / 4,
    "keys_never_read": 6 / 8,
  }
  assert not state.usage["memory_0"].slots.any()
  assert not state.usage["memory_0"].keys.any()
  _, metrics = reported(state, config)  # nothing was read
  assert metrics == {
    "coverage": 0,
    "coverage_virtual": 0,
    "usage_kl": 0,
    "rows_never_read": 1 / 4,
    "keys_never_read": 6 / 8,
  }
  # More reads in all than an int32 holds.
  many = Reads(jnp.full(counters, 2**28, jnp.int32), jnp.asarray(usage_K))
  _, metrics = reported(state.replace(usage={"memory_0": many}), config)
  assert metrics["usage_kl"] == pytest.approx(0, abs=1e-6)


def test_norms_of_rows():
  state = small_steps.first_state(small_steps.SPARSE)
  (path, table), *_ = state.tables.items()
  values_IW = np.arange(table.values_IW.size, dtype=np.float32)
  values_IW = values_IW.reshape(table.values_IW.shape)
  tables = {path: table._replace(values_IW=jnp.asarray(values_IW))}
  _, metrics = health.report(
    state.replace(tables=tables), config=small_steps.SPARSE
  )
  norm_I = np.linalg.norm(values_IW, axis=-1)
  np.testing.assert_allclose(metrics[f"{path}/row_norm"], norm_I.mean(), 1e-6)
  np.testing.assert_allclose(metrics[f"{path}/row_norm_max"], norm_I[-1], 1e-6)


def test_norms_of_a_large_table_are_those_of_a_sample(monkeypatch):
  monkeypatch.setattr(health, "SAMPLED_ROWS", 2)
  values_IW = jnp.array([[3.0, 4.0], [100.0, 0.0], [9.0, 12.0]])
  norms = health._norm_metrics(values_IW)
  assert float(norms["row_norm"]) == 10 and float(norms["row_norm_max"]) == 15
