"""Running an op over blocks of tokens, so that temporaries stay small."""

import functools
import math

import jax
import jax.numpy as jnp

# Bytes of temporaries a block may hold: about what a CPU's cache keeps, and
# enough work to fill an accelerator.
CPU_BLOCK_BYTES = 2**21
ACCELERATOR_BLOCK_BYTES = 2**28


def with_budget(function, *args):
  """function(budget, *args), the budget being that of the platform.

  The platform is the one that the program is lowered for, which need not be
  the one that it is lowered on.

  Args:
    function: (bytes that a block may hold, *args) -> pytree of arrays. Not to
      be differentiated: `platform_dependent` would keep the residuals of all
      platforms.
    args: pytrees of arrays.
  """
  return jax.lax.platform_dependent(
    *args,
    cpu=functools.partial(function, CPU_BLOCK_BYTES),
    default=functools.partial(function, ACCELERATOR_BLOCK_BYTES),
  )


def block_length(
  budget: int, batch: int, length: int, bytes_per_token: int
) -> int:
  """Positions per block for [batch, length, ...] inputs; at least 1."""
  block = budget // max(1, batch * bytes_per_token)
  return max(1, min(length, block))


def scan_blocks(function, carry, inputs, block: int):
  """Scans function over blocks of positions.

  Blocks run along T and keep B whole, so that a batch sharded over devices
  stays sharded. T is padded to whole blocks with zeros.

  Args:
    function: (carry, inputs of one block) -> (carry, outputs of one block);
      arrays of inputs and outputs are [B, block, ...]. Must let a padding
      position of zeros leave the carry as it is.
    carry: any pytree.
    inputs: pytree of [B, T, ...] arrays.
    block: positions per block, at most.
  Returns:
    (carry, outputs [B, T, ...]).
  """
  length = jax.tree.leaves(inputs)[0].shape[1]
  count = math.ceil(length / block)
  if count == 1:
    return function(carry, inputs)
  block = math.ceil(length / count)  # equal blocks need the least padding
  padding = count * block - length

  def split(x):
    x = jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
    x = x.reshape(x.shape[0], count, block, *x.shape[2:])
    return jnp.moveaxis(x, 1, 0)

  def join(x):
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], count * block, *x.shape[3:])[:, :length]

  carry, outputs = jax.lax.scan(function, carry, jax.tree.map(split, inputs))
  return carry, jax.tree.map(join, outputs)
