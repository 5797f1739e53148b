"""Attention over a cache against attention with a mask over all of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import cached_attention
from ultramem_jax.testing import assert_close

B, Q, H = 3, 2, 4
CHUNK = cached_attention.CPU_CHUNK


def make_inputs(size, start, length, kv_heads=Q):
  """A query of slots start ..., a cache, and the segments of both."""
  random = np.random.default_rng(0)
  draw = lambda *shape: random.normal(size=shape).astype(np.float32)
  query_BTQH = draw(B, length, Q, H)
  key_BqSH, value_BqSH = (draw(B, kv_heads, size, H) for _ in range(2))
  # Rows padded by nothing, by a chunk and more, and of several documents.
  segment_BS = np.ones((B, size), np.int32)
  segment_BS[1, : max(0, start - 3)] = 0
  segment_BS[2] = np.arange(size) // 50 + 1
  segment_BT = segment_BS[:, start : start + length]
  return query_BTQH, key_BqSH, value_BqSH, segment_BT, segment_BS, start


def jit_afresh(function):
  """jax.jit that does not reuse what was traced with another budget."""
  return jax.jit(lambda *inputs: function(*inputs))


@functools.partial(jax.jit, static_argnums=6)
def masked(
  query_BTQH, key_BqSH, value_BqSH, segment_BT, segment_BS, start, window=0
):
  slot_T = start + jnp.arange(query_BTQH.shape[1])
  slot_S = np.arange(segment_BS.shape[1])
  mask_BTS = (segment_BT[:, :, None] == segment_BS[:, None, :]) & (
    slot_S[None, None, :] <= slot_T[None, :, None]
  )
  if window:
    mask_BTS &= slot_S[None, None, :] > slot_T[None, :, None] - window
  return jax.nn.dot_product_attention(
    query_BTQH,
    key_BqSH.swapaxes(1, 2),
    value_BqSH.swapaxes(1, 2),
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


@pytest.mark.parametrize("budget", [1, cached_attention.CPU_BYTES])
@pytest.mark.parametrize("window", [0, 3, CHUNK])
def test_grouped_heads_and_windows(window, budget, monkeypatch):
  monkeypatch.setattr(cached_attention, "CPU_BYTES", budget)
  attend = jit_afresh(functools.partial(cached_attention.attend, window=window))
  size = 2 * CHUNK + 37
  for start in (0, CHUNK + 1, size - 5):
    inputs = make_inputs(size, start, 5, kv_heads=1)
    assert_close(attend(*inputs), masked(*inputs, window))


def test_chunks_before_the_window_are_not_read():
  inputs = make_inputs(3 * CHUNK, 2 * CHUNK + 9, 2)
  expected_BTQH = np.asarray(masked(*inputs, 8))
  for cache_BqSH in inputs[1:3]:
    cache_BqSH[:, :, : 2 * CHUNK] = np.nan
  attend = functools.partial(cached_attention.attend, window=8)
  assert_close(jax.jit(attend)(*inputs), expected_BTQH)


def test_only_chunks_in_use_are_read():
  start = CHUNK + 5
  inputs = make_inputs(4 * CHUNK, start, 1)
  expected_BTQH = np.asarray(masked(*inputs))
  for cache_BqSH in inputs[1:3]:
    cache_BqSH[:, :, 2 * CHUNK :] = np.nan
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
