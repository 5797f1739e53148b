"""Row-wise updates of a table from its gradient in factors: AdamW, or SGD.

A table's gradient is a sum over reads: token t read Y rows, row[t, y] with
the weight[t, y], and the loss has the gradient vector[t, e] with respect to
what was pooled in pool e, so

  gradient[i] = sum over t, y with row[t, y] = i of
                weight[t, y, c] * vector[t, pool[t, y], slice c]

Factors are small; the dense gradient is as large as the table, and mostly
zero. Here reads are sorted by row and streamed in chunks: the gradients of a
chunk's rows are summed, and those rows of table and moments read, updated and
written in place. Nothing else of the table is touched.

Z counts all reads, z the reads of a chunk or of a group; i the rows that a
chunk reads.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops import chunks, precision

# Reads whose sums one matrix product takes, where there is a matrix unit.
PRODUCT_READS = 128


class Factors(NamedTuple):
  """The gradient of a table; T counts all tokens, of all layers that read it.

  row_TY: int32, in [0, I]; I marks reads to ignore, such as padding.
  pool_TY: int32, in [0, E).
  weight_TYC: float32, one for each core's slice of a row.
  vector_TEW: float32.
  """

  row_TY: jax.Array
  pool_TY: jax.Array
  weight_TYC: jax.Array
  vector_TEW: jax.Array


class Table(NamedTuple):
  """A table with Adam's moments, each float32 or uint16 (`precision`).

  values_IW: [I, W].
  mu_IW: the first moment; None: the rule has no moments.
  nu: the second moment, which is not centred, [I, W]; or [I] float32, one for
    each row, of the mean of its squared gradients; None: the rule has no
    moments.
  """

  values_IW: jax.Array
  mu_IW: Any
  nu: Any


class AdamW(NamedTuple):
  """AdamW at one step; Python numbers or scalars.

  rate: the learning rate.
  step: counted from 1, for the correction of the moments' bias.
  """

  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  rate: jax.Array | float
  step: jax.Array | int

  def updated(self, rows: Table, gradient_zW: jax.Array) -> Table:
    """Returns float32 rows after the step, from those before it."""
    square = jnp.square(gradient_zW)
    if rows.nu.ndim == 1:
      square = square.mean(-1)
    mu_zW = self.beta1 * rows.mu_IW + (1 - self.beta1) * gradient_zW
    nu = self.beta2 * rows.nu + (1 - self.beta2) * square
    # Scalars are joined first, as every element would be divided by each.
    step = jnp.float32(self.step)
    divisor = jnp.sqrt(nu * (1 / (1 - self.beta2**step))) + self.eps
    rate = self.rate / (1 - self.beta1**step)
    values_zW = rows.values_IW
    values_zW -= self.rate * self.weight_decay * values_zW + rate * mu_zW / (
      divisor if divisor.ndim == 2 else divisor[:, None]
    )
    return Table(values_zW, mu_zW, nu)


class Sgd(NamedTuple):
  """Gradient descent at one step, without moments; as for `AdamW`."""

  weight_decay: float
  rate: jax.Array | float
  step: jax.Array | int

  def updated(self, rows: Table, gradient_zW: jax.Array) -> Table:
    """Returns float32 rows after the step, from those before it."""
    values_zW = rows.values_IW
    values_zW -= self.rate * (self.weight_decay * values_zW + gradient_zW)
    return Table(values_zW, None, None)


def squared_norm(
  factors: Factors, reads: tuple[jax.Array, jax.Array], num_rows: int
) -> jax.Array:
  """Returns the sum of squares of the table's gradient, a float32 scalar.

  Args:
    factors: the gradient.
    reads: of `cpu/sort.sort_by_row`.
    num_rows: I.
  """

  def add(total, row_z, gradient_zW):
    present_z1 = (row_z < num_rows)[:, None]
    return total + jnp.where(present_z1, jnp.square(gradient_zW), 0).sum()

  return chunks.with_budget(
    functools.partial(_scan_rows, add, num_rows), jnp.float32(0), factors, reads
  )


def update_rows(
  table: Table,
  factors: Factors,
  reads: tuple[jax.Array, jax.Array],
  scale: jax.Array | float,
  rule: AdamW | Sgd,
  key: jax.Array,
) -> Table:
  """Updates the rows that were read.

  Rows that were not read stay as they are: they neither decay nor move on by
  their momentum, and their moments do not fade.

  Args:
    table: values and moments.
    factors: the gradient.
    reads: of `cpu/sort.sort_by_row`.
    scale: factor on the gradient, of clipping by norm.
    rule: at this step.
    key: uint32 scalar, from which low precision is rounded.
  Returns:
    The table, updated in place where it is donated.
  """
  num_rows, width = table.values_IW.shape

  def update(table, row_z, gradient_zW, scale, rule, key):
    rows = jax.tree.map(
      lambda x: precision.decode(jnp.take(x, row_z, axis=0, mode="clip")), table
    )
    rows = rule.updated(rows, scale * gradient_zW)
    noise_zW = precision.noise(key, row_z, width)
    rows = _encode(rows, table, noise_zW)
    return jax.tree.map(
      lambda x, rows: x.at[row_z].set(
        rows, mode="drop", unique_indices=True, indices_are_sorted=True
      ),
      table,
      rows,
    )

  def scan(budget, table, factors, reads, *others):
    return _scan_rows(
      lambda *chunk: update(*chunk, *others),
      num_rows,
      budget,
      table,
      factors,
      reads,
    )

  return chunks.with_budget(
    scan, table, factors, reads, jnp.float32(scale), rule, key
  )


def _encode(rows: Table, like: Table, noise_zW) -> Table:
  """Returns float32 rows in a table's dtypes; each array has its own noise."""
  values_zW = precision.encode_at_random(
    rows.values_IW, like.values_IW.dtype, noise_zW & 0xFFFF
  )
  if like.mu_IW is None:
    return Table(values_zW, None, None)
  nu = rows.nu
  if like.nu.dtype == jnp.uint16:
    # The sum of the two halves, and not correlated with either.
    both_zW = (noise_zW + (noise_zW >> 16)) & 0xFFFF
    nu = precision.encode_at_random(nu, jnp.uint16, both_zW)
  return Table(
    values_zW,
    precision.encode_at_random(rows.mu_IW, like.mu_IW.dtype, noise_zW >> 16),
    nu,
  )


def _scan_rows(function, num_rows, budget, carry, factors, reads):
  """Scans function over the gradients of the rows read, in chunks.

  Args:
    function: (carry, row_z, gradient_zW) -> carry. The rows ascend; those
      from I on are to be ignored.
    num_rows: I.
    budget: bytes that the gradients of reads and their sums may have. A chunk
      has some more arrays of that size: rows, before and after.
    carry: any pytree.
    factors: the gradient.
    reads: of `cpu/sort.sort_by_row`.
  Returns:
    The last carry.
  """
  width = factors.vector_TEW.shape[-1]
  length = min(reads[0].size + 1, max(1, budget // (2 * 4 * width)))
  sums = _row_sums
  if budget == chunks.ACCELERATOR_CHUNK_BYTES:
    length = PRODUCT_READS * math.ceil(length / PRODUCT_READS)
    sums = _row_sums_by_products
  count = reads[0].size // length + 1
  # At least one read of no row at the end, so that every run is completed.
  padding = count * length - reads[0].size
  row_Oz, read_Oz = (
    jnp.pad(x, (0, padding), constant_values=end).reshape(count, length)
    for x, end in zip(reads, (num_rows, 0), strict=True)
  )

  def chunk(index, carry):
    outer, run = carry
    row_z, read_z = row_Oz[index], read_Oz[index]
    row_z, sum_zW, run = sums(row_z, _gradients(factors, read_z), run, num_rows)
    return function(outer, row_z, sum_zW), run

  run = (row_Oz[0, 0], jnp.zeros(width, jnp.float32))
  if count == 1:
    return chunk(0, (carry, run))[0]
  # Reads to ignore come last, and may be most: of padding, of rows that are not
  # chosen or that other devices hold. Chunks of nothing else are left out.
  present = (reads[0] < num_rows).sum(dtype=jnp.int32)
  return jax.lax.fori_loop(0, present // length + 1, chunk, (carry, run))[0]


def _gradients(factors: Factors, read_z):
  """Returns what single reads add to their rows' gradients, [z, W] float32."""
  num_reads, num_cores = factors.weight_TYC.shape[1:]
  token_z, y_z = jnp.divmod(read_z, num_reads)
  vector_zW = factors.vector_TEW[token_z, factors.pool_TY[token_z, y_z]]
  weight_zC = factors.weight_TYC[token_z, y_z]
  gradient_zCw = (
    vector_zW.reshape(-1, num_cores, vector_zW.shape[-1] // num_cores)
    * weight_zC[..., None]
  )
  return gradient_zCw.reshape(vector_zW.shape)


def _row_sums(row_z, gradient_zW, run, num_rows):
  """Sums the gradients of each row; the last row's go on in the next chunk.

  Args:
    row_z: ascending.
    gradient_zW: of single reads.
    run: (row, sum_W), the row in which the previous chunk ended.
    num_rows: I.
  Returns:
    (row_z, sum_zW, run): the rows completed, then rows from I on that stand
    for nothing; and the run to go on with.
  """
  length, width = gradient_zW.shape
  previous_z = jnp.concatenate([run[0][None], row_z[:-1]])
  # 0 is the run that goes on; there are at most as many more as reads.
  segment_z = jnp.cumsum(row_z != previous_z, dtype=jnp.int32)
  sum_iW = jnp.zeros((length + 1, width), jnp.float32).at[0].set(run[1])
  sum_iW = sum_iW.at[segment_z].add(
    gradient_zW, mode="promise_in_bounds", indices_are_sorted=True
  )
  row_i = jnp.zeros(length + 1, jnp.int32).at[0].set(run[0])
  row_i = row_i.at[segment_z].set(row_z, mode="promise_in_bounds")
  slot_z = jnp.arange(length, dtype=jnp.int32)
  last = segment_z[-1]
  row_i = jnp.where(slot_z < last, row_i[:-1], num_rows + slot_z)
  return row_i, sum_iW[:-1], (row_z[-1], sum_iW[last])


def _row_sums_by_products(row_z, gradient_zW, run, num_rows):
  """Sums as `_row_sums` does, without a scatter, which is slow on accelerators.

  Sums to the left inside a row come from products with 0-1 matrices in groups
  of `PRODUCT_READS` reads, O groups of z, and a scan over the groups.
  """
  length, width = gradient_zW.shape
  row_Oz = row_z.reshape(-1, PRODUCT_READS)
  same_Ozz = row_Oz[:, :, None] == row_Oz[:, None, :]
  before_zz = jnp.tri(PRODUCT_READS, dtype=bool)
  sum_OzW = jnp.matmul(
    (same_Ozz & before_zz[None]).astype(jnp.float32),
    gradient_zW.reshape(*row_Oz.shape, width),
    precision=precision.EXACT,
  )
  # What the open row of each group sums to, from the first group on.
  previous_O = jnp.concatenate([run[0][None], row_Oz[:-1, -1]])
  whole_O = row_Oz[:, -1] == previous_O

  def join(left, right):
    (left_whole, left_sum), (right_whole, right_sum) = left, right
    return (
      left_whole & right_whole,
      right_sum + jnp.where(right_whole[..., None], left_sum, 0),
    )

  whole_O, open_OW = jax.lax.associative_scan(join, (whole_O, sum_OzW[:, -1]))
  open_OW += jnp.where(whole_O[:, None], run[1][None], 0)
  carried_OW = jnp.concatenate([run[1][None], open_OW[:-1]])
  goes_on_Oz = row_Oz == previous_O[:, None]
  sum_OzW += jnp.where(goes_on_Oz[..., None], carried_OW[:, None], 0)
  sum_zW = sum_OzW.reshape(length, width)
  # A row is completed where another follows; those places first, in order.
  previous_z = jnp.concatenate([run[0][None], row_z[:-1]])
  before_zW = jnp.concatenate([run[1][None], sum_zW[:-1]])
  slot_z = jnp.arange(length, dtype=jnp.int32)
  place_z = jnp.sort(jnp.where(previous_z != row_z, slot_z, slot_z + length))
  complete_z = place_z < length
  place_z %= length
  row_z, last = (
    jnp.where(complete_z, previous_z[place_z], num_rows + slot_z),
    row_z[-1],
  )
  return row_z, before_zW[place_z], (last, sum_zW[-1])


def update_rows_reference(
  table: Table, factors: Factors, scale: jax.Array | float, rule: AdamW | Sgd
) -> Table:
  """Computes `update_rows` of float32 by a dense gradient, slowly."""
  f = factors
  num_rows, width = table.values_IW.shape
  weight_TYW = jnp.repeat(
    f.weight_TYC, width // f.weight_TYC.shape[-1], axis=-1
  )
  token_T1 = jnp.arange(f.row_TY.shape[0])[:, None]
  gradient_IW = (
    jnp.zeros((num_rows, width), jnp.float32)
    .at[f.row_TY]
    .add(weight_TYW * f.vector_TEW[token_T1, f.pool_TY])
  )
  was_read_I = jnp.zeros(num_rows, bool).at[f.row_TY].set(True)
  updated = rule.updated(table, scale * gradient_IW)
  return jax.tree.map(
    lambda new, old: jnp.where(
      was_read_I.reshape(-1, *(1,) * (new.ndim - 1)), new, old
    ),
    updated,
    table,
  )
