"""Times of functions that take turns, and what the machine reaches."""

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Name = TypeVar("Name")


def interleaved_seconds(
  functions: Mapping[Name, Callable[[], Any]], rounds: int, warmup: int = 2
) -> dict[Name, float]:
  """Returns the median seconds of each function, all called in every round.

  Args:
    functions: by name; each returns arrays to wait for.
    rounds: timed calls of each.
    warmup: calls of each before, not timed.
  """
  seconds = {name: [] for name in functions}
  for round_index in range(warmup + rounds):
    for name, function in functions.items():
      began = time.perf_counter()
      jax.block_until_ready(function())
      if round_index >= warmup:
        seconds[name].append(time.perf_counter() - began)
  return {name: statistics.median(times) for name, times in seconds.items()}


def median_seconds(function: Callable[[], Any], rounds: int) -> float:
  """Returns the median seconds of one function."""
  return interleaved_seconds({"": function}, rounds)[""]


def copy_bytes_per_second(size: int = 2**28) -> float:
  """Returns the bytes that adding to an array in place reads and writes.

  Args:
    size: bytes of the array.
  """
  array = jnp.zeros(size // 4, jnp.float32)
  add = jax.jit(lambda x: x + 1, donate_argnums=0)

  def call():
    nonlocal array
    array = add(array)
    return array

  return 2 * size / median_seconds(call, 9)


def matmul_flops_per_second(size: int = 4096) -> float:
  """Returns what a float32 product of square matrices reaches.

  Args:
    size: of their side.
  """
  x = jnp.ones((size, size))
  matmul = jax.jit(lambda x: x @ x)
  return 2 * size**3 / median_seconds(lambda: matmul(x), 5)
