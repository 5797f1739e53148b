"""Runs an op on chunks of positions, so that its temporaries stay small."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Bytes of temporaries that a chunk may hold: about what a CPU's cache keeps,
# and enough work to fill an accelerator.
CPU_CHUNK_BYTES = 2**21
ACCELERATOR_CHUNK_BYTES = 2**28


def with_budget(function: Callable[..., Any], *args: Any) -> Any:
  """Returns function(budget, *args), with the budget of the platform.

  The platform is the one that the program is lowered for, which may differ
  from the one it is lowered on.

  Args:
    function: (bytes that a chunk may hold, *args) -> pytree of arrays. Must not
      be differentiated: `platform_dependent` would keep the residuals of all
      platforms.
    args: pytrees of arrays.
  """
  return jax.lax.platform_dependent(
    *args,
    cpu=functools.partial(function, CPU_CHUNK_BYTES),
    default=functools.partial(function, ACCELERATOR_CHUNK_BYTES),
  )


def chunk_length(
  budget: int, batch: int, length: int, bytes_per_token: int
) -> int:
  """Returns the positions per chunk of [batch, length, ...] arrays, from 1."""
  positions = budget // max(1, batch * bytes_per_token)
  return max(1, min(length, positions))


def scan_chunks(
  function: Callable[[Any, Any], tuple[Any, Any]],
  carry: Any,
  inputs: Any,
  most: int,
) -> tuple[Any, Any]:
  """Scans a function over chunks of positions.

  Chunks are cut along T and keep B whole, so that a batch that is sharded over
  devices stays sharded. T is padded with zeros to whole chunks.

  Args:
    function: (carry, inputs of a chunk) -> (carry, outputs of that chunk); its
      arrays are [B, positions, ...]. A padding position of zeros must leave
      the carry unchanged.
    carry: any pytree.
    inputs: pytree of [B, T, ...] arrays.
    most: positions per chunk, at most.
  Returns:
    (carry, outputs [B, T, ...]).
  """
  length = jax.tree.leaves(inputs)[0].shape[1]
  count = math.ceil(length / most)
  if count == 1:
    return function(carry, inputs)
  positions = math.ceil(length / count)  # equal chunks need the least padding
  padding = count * positions - length

  def cut(x):
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], count, positions, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], count * positions, *x.shape[3:])[:, :length]

  carry, outputs = jax.lax.scan(function, carry, jax.tree.map(cut, inputs))
  return carry, jax.tree.map(join, outputs)
