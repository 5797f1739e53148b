"""Attention over a cache against attention with a mask over all of it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import cached_attention
from ultramem_jax.testing import assert_close

B, Q, H = 3, 2, 4
CHUNK = cached_attention.CPU_CHUNK


def make_inputs(size, start, length):
  """A query of slots start ..., a cache, and the segments of both."""
  random = np.random.default_rng(0)
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  query_BTQH = draw(B, length, Q, H)
  key_BQSH, value_BQSH = (draw(B, Q, size, H) for _ in range(2))
  # Rows padded by nothing, by a chunk and more, and of several documents.
  segment_BS = np.ones((B, size), np.int32)
  segment_BS[1, : max(0, start - 3)] = 0
  segment_BS[2] = np.arange(size) // 50 + 1
  segment_BT = segment_BS[:, start : start + length]
  return query_BTQH, key_BQSH, value_BQSH, segment_BT, segment_BS, start


def jit_afresh(function):
  """jax.jit that does not reuse what was traced with another budget."""
  return jax.jit(lambda *inputs: function(*inputs))


@jax.jit
def masked(query_BTQH, key_BQSH, value_BQSH, segment_BT, segment_BS, start):
  slot_T = start + jnp.arange(query_BTQH.shape[1])
  slot_S = np.arange(segment_BS.shape[1])
  mask_BTS = (segment_BT[:, :, None] == segment_BS[:, None, :]) & (
    slot_S[None, None, :] <= slot_T[None, :, None]
  )
  return jax.nn.dot_product_attention(
    query_BTQH,
    key_BQSH.swapaxes(1, 2),
    value_BQSH.swapaxes(1, 2),
    mask=mask_BTS[:, None],
  )


@pytest.mark.parametrize("budget", [1, cached_attention.CPU_BYTES])
@pytest.mark.parametrize("size", [7, CHUNK, 2 * CHUNK, 2 * CHUNK + 37])
@pytest.mark.parametrize("length", [1, 5])
def test_equals_masked_attention(size, length, budget, monkeypatch):
  """Whole batches at a time, and where they are too large, row by row."""
  monkeypatch.setattr(cached_attention, "CPU_BYTES", budget)
  attend = jit_afresh(cached_attention.attend)
  for start in sorted({0, (size - length) // 2, size - length}):
    inputs = make_inputs(size, start, length)
    assert_close(attend(*inputs), masked(*inputs))


def test_only_chunks_in_use_are_read():
  start = CHUNK + 5
  inputs = make_inputs(4 * CHUNK, start, 1)
  expected_BTQH = np.asarray(masked(*inputs))
  for cache_BQSH in inputs[1:3]:
    cache_BQSH[:, :, 2 * CHUNK :] = np.nan
  assert_close(jax.jit(cached_attention.attend)(*inputs), expected_BTQH)


@pytest.mark.parametrize("size", [CHUNK, 2 * CHUNK])
def test_one_query_copies_nothing_of_a_cache_of_one_chunk(size, monkeypatch):
  monkeypatch.setattr(cached_attention, "CPU_BYTES", 1)
  text = (
    jit_afresh(cached_attention.attend)
    .lower(*make_inputs(size, size - 1, 1))
    .compile()
    .as_text()
  )
  # Keys or values of a chunk, of one row of the batch or of all.
  copied = re.findall(rf"= f32\[\d+,{Q},{CHUNK},{H}\]\S* [\w-]+\(", text)
  copied = [line for line in copied if not line.endswith(" parameter(")]
  assert bool(copied) == (size > CHUNK)


def test_bfloat16():
  inputs = make_inputs(2 * CHUNK, CHUNK + 9, 2)
  narrow = [x.astype(jnp.bfloat16) for x in inputs[:3]]
  y_BTQH = jax.jit(cached_attention.attend)(*narrow, *inputs[3:])
  assert y_BTQH.dtype == jnp.bfloat16
  wide = [x.astype(np.float32) for x in narrow]
  assert_close(y_BTQH, masked(*wide, *inputs[3:]), "bfloat16")
