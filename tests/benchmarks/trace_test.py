"""A trace says where the time of compiled programs went."""

import os
import time

import jax
import jax.numpy as jnp
import pytest

from benchmarks.harness import trace


@jax.jit
def program(x):
  """A matmul, a sort, a loop whose body is elementwise, and a transpose."""
  with jax.named_scope("layer_0"):
    y = jnp.sort(jax.lax.optimization_barrier(x @ x))
  y = jax.lax.fori_loop(
    0, 20, lambda _, y: jax.lax.optimization_barrier(jnp.sin(y)), y
  )
  return jax.lax.optimization_barrier(y).T + 0.0 * x


def test_time_has_the_kind_and_the_part_of_its_operations():
  x = jnp.ones((512, 512))
  program(x).block_until_ready()
  began = time.perf_counter()
  times = trace.measure(lambda: program(x), 1)
  kinds, parts = times["kinds"], times["parts"]
  assert {trace.MATMUL, "top-k, sort", trace.ELEMENTWISE} <= kinds.keys()
  assert kinds.get("unknown") is None
  # Times of operations, not of what is inside them as well.
  assert 0 < kinds.get("loop, call", 0.0) < kinds[trace.ELEMENTWISE]
  threads = os.cpu_count() * (time.perf_counter() - began)
  assert sum(kinds.values()) == pytest.approx(sum(parts.values()))
  assert sum(kinds.values()) < threads
  # The layer may hold nothing else: its sum then differs by rounding alone.
  inside = kinds[trace.MATMUL] + kinds["top-k, sort"]
  assert parts["layer"] >= inside * (1 - 1e-9)


def test_a_folder_without_a_trace_is_an_error(tmp_path):
  with pytest.raises(SystemExit, match="no trace"):
    trace.summary(str(tmp_path), 1)
