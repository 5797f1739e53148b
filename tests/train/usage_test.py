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
  np.testing.assert_array_equal(once.usage["memory_0"].slots, count_U)
  # A second step adds to it.
  twice, _ = small_steps.train_step(once, batch, config)
  assert twice.usage["memory_0"].slots.sum() == 2 * reads
  # Of keys those of the first position, the only one of eight.
  cell_BTAM = np.asarray(sown["intermediates"]["memory_0"]["cell_BTAM"][0])
  keys_PAN = np.zeros((2, memory.num_heads, memory.grid_side), np.int32)
  for b in np.flatnonzero(batch["segments"][:, 0]):
    for a, cells_M in enumerate(cell_BTAM[b, 0]):
      for cell in cells_M:
        keys_PAN[0, a, cell // memory.grid_side] += 1
        keys_PAN[1, a, cell % memory.grid_side] += 1
  assert batch["tokens"].shape[1] == usage.KEY_STRIDE and keys_PAN.sum() > 0
  np.testing.assert_array_equal(once.usage["memory_0"].keys, keys_PAN.ravel())


def test_keys_are_counted_at_every_eighth_position():
  batch, length, heads, reads, side = 2, 20, 2, 3, 6
  rng = np.random.default_rng(0)
  shape = (batch, length, heads, reads)
  cell_BTAM = rng.integers(0, side**2, shape).astype(np.int32)
  held = usage.Reads(
    jnp.zeros(side**2, jnp.int32), jnp.zeros(2 * heads * side, jnp.int32)
  )
  is_read_BT = rng.random((batch, length)) < 0.7
  counted = usage.count(
    {"m": held}, {"m": cell_BTAM}, {"m": cell_BTAM}, is_read_BT
  )["m"]
  keys_PAN = np.zeros((2, heads, side), np.int32)
  for b, t, a, m in np.ndindex(shape):
    if t % 8 == 0 and is_read_BT[b, t]:
      for p, key in enumerate(divmod(cell_BTAM[b, t, a, m], side)):
        keys_PAN[p, a, key] += 1
  np.testing.assert_array_equal(counted.keys, keys_PAN.ravel())
