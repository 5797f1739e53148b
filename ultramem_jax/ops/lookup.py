"""Lookup: pooled rows of a value table, with gradients of their own.

Tables are float, or low precision stored as integers: uint16 holds the bits of
bfloat16 numbers, because XLA's CPU compiler would convert a whole bfloat16
table to float32 before a loop that reads it; int8 holds numbers that the
caller scales. Integer tables have no gradient (float0).
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from ultramem_jax.ops import chunks, precision
from ultramem_jax.settings.checks import require

# Kernels of platforms, by the platform's name in lowering: modules with the
# functions `takes`, `pool` and `dot`, and a text TABLES.
Kernels = tuple[tuple[str, Any], ...]

# Rows that one pass over the pooled vectors reads at most, on a CPU. From
# about 12 on the memory's bandwidth is reached.
ROWS_PER_PASS = 21


def pool_rows(
  table_IW: jax.Array,
  index_BTY: jax.Array,
  score_BTYC: jax.Array,
  num_pools: int = 1,
  kernels: Kernels = (),
) -> jax.Array:
  """Returns weighted sums of table rows, one sum for each pool.

    pooled[e, c] = sum over y with index[y] div I = e of
                   score[y, c] * table[index[y] mod I, slice c]

  Implicit value expansion pools first and projects after (paper section 3.4);
  multi-core scoring weights the c-th contiguous slice of a row by core c's
  own score (section 3.5). Rows are gathered in chunks of positions: an array
  [B, T, Y, W] never exists, forward or backward.

  Args:
    table_IW: [I, W] float, uint16 (bits of bfloat16) or int8; W divisible
      by C.
    index_BTY: [B, T, Y] int32 in [0, E * I): row + I * pool.
    score_BTYC: [B, T, Y, C] float32.
    num_pools: E.
    kernels: that read the table on their platforms; `pallas.KERNELS` or ().
  Returns:
    [B, T, E, W] float32. Differentiable in table, if float, and score.
  Raises:
    ConfigError: no kernel for this machine's accelerator reads such a table.
  """
  if num_pools == 1:
    pool_BTY, row_BTY = jnp.zeros_like(index_BTY), index_BTY
  else:
    pool_BTY, row_BTY = jnp.divmod(index_BTY, table_IW.shape[0])
  return _pool(num_pools, kernels, table_IW, row_BTY, pool_BTY, score_BTYC)


def dot_rows(
  table_IW: jax.Array,
  index_BTY: jax.Array,
  x_BTW: jax.Array,
  kernels: Kernels = (),
) -> jax.Array:
  """Returns inner products of table rows with each position's own vector.

    out[y] = <table[index[y]], x>

  Runs in chunks of positions like `pool_rows`.

  Args:
    table_IW: [I, W] float, uint16 (bits of bfloat16) or int8.
    index_BTY: [B, T, Y] int32 in [0, I).
    x_BTW: [B, T, W] float.
    kernels: see `pool_rows`.
  Returns:
    [B, T, Y] float32. Differentiable in table, if float, and x.
  Raises:
    ConfigError: see `pool_rows`.
  """
  x_BTEW = x_BTW.astype(jnp.float32)[:, :, None]
  pool_BTY = jnp.zeros_like(index_BTY)
  out_BTYC: Any = _dot(1, kernels, table_IW, index_BTY, pool_BTY, x_BTEW)
  return out_BTYC[..., 0]


# `_pool` and `_dot` are each other's gradients: the gradient of `_pool` with
# respect to the scores is `_dot`, and the reverse. The gradients of scores and
# table are two loops, so that the table's is dead code where nobody uses it.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pool(
  num_pools, kernels, table_IW, row_BTY, pool_BTY, score_BTYC
) -> jax.Array:
  """Returns the sum [B, T, E, W] of each pool's rows times their scores."""
  return jax.lax.platform_dependent(
    table_IW,
    row_BTY,
    pool_BTY,
    score_BTYC,
    cpu=functools.partial(_pool_in_turn, num_pools),
    default=functools.partial(_pool_at_once, num_pools),
    **_kernel_branches(
      kernels, "pool", num_pools, table_IW, score_BTYC.shape[-1]
    ),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _dot(num_cores, kernels, table_IW, row_BTY, pool_BTY, x_BTEW) -> jax.Array:
  """Returns products [B, T, Y, C] of row slices with their pool's vector."""

  def dot(of_pool, budget, table_IW, *inputs):
    def dot_chunk(_, inputs):
      row_BTY, pool_BTY, x_BTEW = inputs
      product_BTYW = _gather(table_IW, row_BTY) * of_pool(pool_BTY, x_BTEW)
      # A product with ones, because XLA would fuse the gather into a sum, and
      # a CPU would then read and add number by number.
      product_BTYCw = _by_core(product_BTYW, num_cores)
      ones_w = jnp.ones(product_BTYCw.shape[-1:], jnp.float32)
      return None, jnp.einsum(
        "BTYCw,w->BTYC", product_BTYCw, ones_w, precision=precision.EXACT
      )

    length = _chunk_length(budget, table_IW, inputs[0])
    return chunks.scan_chunks(dot_chunk, None, inputs, length)[1]

  return _by_platform(
    dot,
    table_IW,
    row_BTY,
    pool_BTY,
    x_BTEW,
    **_kernel_branches(kernels, "dot", num_cores, table_IW, num_cores),
  )


def _kernel_branches(kernels: Kernels, op, count, table_IW, num_cores):
  """Returns the op of each platform's kernel that takes the table."""
  if not kernels:  # without them, tracing touches no device
    return {}
  branches = {
    platform: functools.partial(getattr(kernel, op), count)
    for platform, kernel in kernels
    if kernel.takes(table_IW, num_cores)
  }
  here = {"gpu": "cuda", "tpu": "tpu"}.get(jax.default_backend())
  require(
    here in branches if here else bool(branches),
    "model.memory.storage.kernel",
    "pallas",
    f"reads {' and '.join(kernel.TABLES for _, kernel in kernels)}; this "
    f"table is stored as {table_IW.dtype}, with {table_IW.shape[1]} columns "
    f"for {num_cores} cores",
  )
  return branches


def _pool_forward(num_pools, kernels, *inputs):
  return _pool(num_pools, kernels, *inputs), inputs


def _pool_backward(num_pools, kernels, residuals, gradient_BTEW):
  del num_pools
  table_IW, row_BTY, pool_BTY, score_BTYC = residuals
  num_cores = score_BTYC.shape[-1]
  return (
    _table_gradient(*residuals, gradient_BTEW),
    None,
    None,
    _dot(num_cores, kernels, table_IW, row_BTY, pool_BTY, gradient_BTEW),
  )


def _dot_forward(num_cores, kernels, *inputs):
  return _dot(num_cores, kernels, *inputs), inputs


def _dot_backward(num_cores, kernels, residuals, gradient_BTYC):
  del num_cores
  table_IW, row_BTY, pool_BTY, x_BTEW = residuals
  num_pools = x_BTEW.shape[2]
  return (
    _table_gradient(table_IW, row_BTY, pool_BTY, gradient_BTYC, x_BTEW),
    None,
    None,
    _pool(num_pools, kernels, table_IW, row_BTY, pool_BTY, gradient_BTYC),
  )


_pool.defvjp(_pool_forward, _pool_backward)
_dot.defvjp(_dot_forward, _dot_backward)


def _table_gradient(table_IW, *inputs):
  """Returns the gradient of the sum of score * row * x; None for integers.

  Args:
    table_IW: the table.
    inputs: row_BTY, pool_BTY, score_BTYC, x_BTEW.
  """
  if not jnp.issubdtype(table_IW.dtype, jnp.floating):
    return None

  def gradient(of_pool, budget, table_IW, *inputs):
    def add_chunk(table_gradient_IW, inputs):
      row_BTY, pool_BTY, score_BTYC, x_BTEW = inputs
      x_BTYCw = _by_core(of_pool(pool_BTY, x_BTEW), score_BTYC.shape[-1])
      update_BTYW = _join_cores(score_BTYC[..., None] * x_BTYCw)
      return table_gradient_IW.at[row_BTY].add(
        update_BTYW.astype(table_IW.dtype), mode="promise_in_bounds"
      ), None

    length = _chunk_length(budget, table_IW, inputs[0])
    zeros_IW = jnp.zeros_like(table_IW)
    return chunks.scan_chunks(add_chunk, zeros_IW, inputs, length)[0]

  return _by_platform(gradient, table_IW, *inputs)


def _pool_in_turn(num_pools, table_IW, *inputs):
  """Adds the first row of every token, then the second row, and so on.

  A pass over the sums reads ROWS_PER_PASS rows. XLA's CPU compiler turns it
  into one loop of vector instructions, with that many reads under way at once.
  For each row the sums of the other pools read the token's first row instead,
  with score 0: it is in the cache and costs little.
  """
  pool_E = jnp.arange(num_pools, dtype=jnp.int32)

  def pool_chunk(_, inputs):
    first_BT1 = inputs[0][..., :1]

    def add_rows(pooled_BTECw, read):
      row_BT, pool_BT, score_BTC = read
      row_BTE, score_BTEC = row_BT[..., None], score_BTC[:, :, None]
      if num_pools > 1:
        is_own_BTE = pool_BT[..., None] == pool_E[None, None]
        row_BTE = jnp.where(is_own_BTE, row_BTE, first_BT1)
        score_BTEC = jnp.where(is_own_BTE[..., None], score_BTEC, 0)
      rows_BTECw = _by_core(_gather(table_IW, row_BTE), score_BTC.shape[-1])
      return pooled_BTECw + score_BTEC[..., None] * rows_BTECw, None

    batch, length, num_rows, num_cores = inputs[-1].shape
    passes = math.ceil(num_rows / ROWS_PER_PASS)
    zeros_BTECw = jnp.zeros(
      (batch, length, num_pools, num_cores, table_IW.shape[1] // num_cores),
      jnp.float32,
    )
    reads = jax.tree.map(lambda x: jnp.moveaxis(x, 2, 0), inputs)
    pooled_BTECw, _ = jax.lax.scan(
      add_rows, zeros_BTECw, reads, unroll=math.ceil(num_rows / passes)
    )
    return None, _join_cores(pooled_BTECw)

  length = chunks.chunk_length(
    chunks.CPU_CHUNK_BYTES,
    inputs[0].shape[0],
    inputs[0].shape[1],
    4 * num_pools * table_IW.shape[1],
  )
  return chunks.scan_chunks(pool_chunk, None, inputs, length)[1]


def _pool_at_once(num_pools, table_IW, *inputs):
  """Gathers a chunk's rows and multiplies them by a matrix of scores."""

  def pool_chunk(_, inputs):
    row_BTY, pool_BTY, score_BTYC = inputs
    rows_BTYCw = _by_core(_gather(table_IW, row_BTY), score_BTYC.shape[-1])
    weight_BTYEC = (
      _one_hot(pool_BTY, num_pools)[..., None] * score_BTYC[..., None, :]
    )
    pooled_BTECw = jnp.einsum(
      "BTYEC,BTYCw->BTECw", weight_BTYEC, rows_BTYCw, precision=precision.EXACT
    )
    return None, _join_cores(pooled_BTECw)

  length = _chunk_length(chunks.ACCELERATOR_CHUNK_BYTES, table_IW, inputs[0])
  return chunks.scan_chunks(pool_chunk, None, inputs, length)[1]


def _by_platform(function, *args, **branches):
  """Returns function(of_pool, bytes of a chunk, *args), or that of a branch.

  `of_pool` takes pool_BTY and x_BTEW and returns each row's own vector,
  [B, T, Y, W]: by a gather on a CPU, by a product elsewhere.
  """
  return jax.lax.platform_dependent(
    *args,
    cpu=functools.partial(function, _take_pool, chunks.CPU_CHUNK_BYTES),
    default=functools.partial(
      function, _multiply_pool, chunks.ACCELERATOR_CHUNK_BYTES
    ),
    **branches,
  )


def _take_pool(pool_BTY, x_BTEW):
  return jnp.take_along_axis(
    x_BTEW, pool_BTY[..., None], axis=2, mode="promise_in_bounds"
  )


def _multiply_pool(pool_BTY, x_BTEW):
  one_hot_BTYE = _one_hot(pool_BTY, x_BTEW.shape[2])
  return jnp.einsum(
    "BTYE,BTEW->BTYW", one_hot_BTYE, x_BTEW, precision=precision.EXACT
  )


def _chunk_length(budget, table_IW, row_BTY):
  batch, length, rows = row_BTY.shape
  return chunks.chunk_length(
    budget, batch, length, 4 * rows * table_IW.shape[1]
  )


def _gather(table_IW, row_BTY):
  """Returns the chosen rows as float32 [B, T, Y, W]."""
  rows_BTYW = jnp.take(table_IW, row_BTY, axis=0, mode="clip")
  return precision.decode(rows_BTYW)


def _one_hot(pool_BTY, num_pools):
  return jax.nn.one_hot(pool_BTY, num_pools, dtype=jnp.float32)


def _by_core(x, num_cores):
  """Cuts rows into the slices of the cores: [..., W] -> [..., C, w]."""
  return x.reshape(*x.shape[:-1], num_cores, -1)


def _join_cores(x):
  """Joins the slices of the cores: [..., C, w] -> [..., W]."""
  return x.reshape(*x.shape[:-2], -1)


def pool_rows_reference(
  table_IW: jax.Array,
  index_BTY: jax.Array,
  score_BTYC: jax.Array,
  num_pools: int = 1,
) -> jax.Array:
  """Computes `pool_rows` from its definition: slow, no custom gradient."""
  num_rows, width = table_IW.shape
  num_cores = score_BTYC.shape[-1]
  weight_BTYW = jnp.repeat(score_BTYC, width // num_cores, axis=-1)
  weighted_BTYW = weight_BTYW * table_IW[index_BTY % num_rows]
  pooled = [
    jnp.where((index_BTY // num_rows == pool)[..., None], weighted_BTYW, 0).sum(
      -2
    )
    for pool in range(num_pools)
  ]
  return jnp.stack(pooled, axis=-2)


def dot_rows_reference(
  table_IW: jax.Array, index_BTY: jax.Array, x_BTW: jax.Array
) -> jax.Array:
  """Computes `dot_rows` from its definition: slow, no custom gradient."""
  return (table_IW[index_BTY] * x_BTW[..., None, :]).sum(-1)
