"""Rows fetched in rounds; run by tests/eight_devices_test.py."""

import jax
import pytest

from tests.eight_devices.split_tables import (
  inputs,
  make_layout,
  on_one_device,
  sharded,
)
from ultramem_jax.ops.sharded import fetch
from ultramem_jax.ops.sharded.exchange import Exchange
from ultramem_jax.testing import assert_close


def rounds(layout, num_rows, index_BTY):
  """Rounds in which the rows of all devices come, as `fetch` plans them."""
  apart = layout.tokens(*index_BTY.shape[:2])
  exchange = Exchange(
    layout.table_axes, layout.table_axes, (), layout.mesh.shape, "float32"
  )
  held = num_rows // exchange.count(exchange.table_axes)

  def plan(index_BTY):
    return fetch.plan(exchange, index_BTY % num_rows, held).rounds

  whole = jax.sharding.PartitionSpec()
  return int(jax.jit(layout.shard_map(plan, apart, whole))(index_BTY))


@pytest.mark.parametrize(
  "read_rows, expected",
  [
    # Evenly spread; all of one device, which holds 64; a few of those, each
    # read by many tokens. A device reads 40, and there is room for 18.
    (512, 1),
    (64, 2),
    (8, 1),
  ],
)
def test_every_row_comes_once_however_skewed_the_reads(read_rows, expected):
  table_IW, index_BTY, score_BTYC, x_BTW = inputs(8, 512, read_rows)
  layout = make_layout("tokens differ", "rows_unpooled")
  assert rounds(layout, 512, index_BTY) == expected
  arguments = (table_IW, score_BTYC, x_BTW, index_BTY)
  assert_close(sharded(layout, arguments), on_one_device(*arguments))
