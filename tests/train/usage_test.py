"""How often rows are read: counted by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import small_steps
from ultramem_jax.layers import buffers as buffers_lib
from ultramem_jax.train import usage


@pytest.mark.parametrize(
  "config", [small_steps.CONFIG, small_steps.TWO_PARTS], ids=["one", "two"]
)
def test_usage_counts_the_reads_of_tokens_that_are_there(config):
  state, batch = small_steps.first_state(config), small_steps.make_batch()
  buffers = buffers_lib.refresh_buffers(state.params, state.buffers)
  _, sown = small_steps.forward(config.model)(
    {**state.variables(), "buffers": buffers}, batch
  )
  slot_BTAM = np.asarray(sown["intermediates"]["memory_0"]["slot_BTAM"][0])
  memory = config.model.memory
  assert slot_BTAM.shape[2:] == (memory.num_heads, memory.top_m)
  count_U = np.zeros(memory.grid_side**2, np.int32)
  for b, t in np.argwhere(batch["segments"]):
    for slot in slot_BTAM[b, t].ravel():
      count_U[slot] += 1
  reads = int((batch["segments"] > 0).sum()) * slot_BTAM[0, 0].size
  assert reads < slot_BTAM.size  # there is padding
  assert count_U.sum() == reads
  once, _ = small_steps.first_step(config)
  np.testing.assert_array_equal(once.usage["memory_0"], count_U)
  # A second step adds to it.
  twice, _ = small_steps.train_step(once, batch, config)
  assert twice.usage["memory_0"].sum() == 2 * reads


@pytest.mark.parametrize("row_multiple, counters", [(1, 16), (3, 18)])
def test_usage_report_by_hand(row_multiple, counters):
  # Four rows in two blocks: slots 0-3 read rows 0-3, slots 4-7 again.
  config = small_steps.make_config(
    model__memory__num_keys=2,
    model__memory__expansion=4,
    model__memory__top_m=2,
    model__memory__storage__row_multiple=row_multiple,
  )
  usage_U = np.zeros(counters, np.int32)
  usage_U[[0, 4, 1, 9]] = 3, 1, 2, 2  # row 0: 3 + 1, row 1: 2 + 2
  state = small_steps.first_state().replace(
    usage={"memory_0": jnp.asarray(usage_U)}
  )
  state, metrics = usage.report(state, config=config)
  assert {name: float(value) for name, value in metrics.items()} == {
    "memory_0/coverage": 2 / 4,
    "memory_0/coverage_virtual": 4 / 16,
    # sum of p log(p / (1 / 4)) with p = 1 / 2 twice
    "memory_0/usage_kl": pytest.approx(np.log(2)),
  }
  assert not state.usage["memory_0"].any()
  _, metrics = usage.report(state, config=config)  # nothing was read
  assert {float(value) for value in metrics.values()} == {0.0}
  # More reads in all than an int32 holds.
  even = small_steps.first_state().replace(
    usage={"memory_0": jnp.full(16, 2**28, jnp.int32)}
  )
  _, metrics = usage.report(even, config=config)
  assert float(metrics["memory_0/usage_kl"]) == pytest.approx(0, abs=1e-6)
