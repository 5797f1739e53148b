"""Counts of rows; run by tests/eight_devices_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from tests.eight_devices.split_tables import MESHES, make_layout
from ultramem_jax.ops.sharded import row_count


@pytest.mark.parametrize("slots", [64, 512])  # of 160 reads: counts or slots
@pytest.mark.parametrize("mesh", MESHES)  # travel
def test_rows_are_counted_where_they_lie(mesh, slots):
  rng = np.random.default_rng(0)
  slot_BTY = rng.integers(0, slots, (8, 4, 5)).astype(np.int32)
  slot_BTY[::2, 0] = slots  # past the end
  layout = make_layout(mesh, "columns")
  sharding_U = NamedSharding(
    layout.mesh, jax.sharding.PartitionSpec(layout.table_axes)
  )
  count_U = jax.jit(lambda *args: row_count.count_rows(*args, layout=layout))(
    jax.device_put(jnp.ones(slots, jnp.int32), sharding_U), slot_BTY
  )
  expected_U = 1 + np.bincount(slot_BTY.reshape(-1))[:slots]
  np.testing.assert_array_equal(count_U, expected_U)
  assert count_U.sharding.is_equivalent_to(sharding_U, 1)
