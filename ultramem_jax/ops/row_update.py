"""Row-wise AdamW: updates of a table from its gradient in factors.

A table's gradient is a sum over reads: token t read K rows, row[t, k] with
the weight[t, k], and the loss has the gradient vector[t, e] in what block e
pooled, so

  gradient[i] = sum over t, k with row[t, k] = i of
                weight[t, k, c] * vector[t, block[t, k], slice c]

Factors are small; the dense gradient is as large as the table, and mostly
zero. Here reads are sorted by row and streamed in blocks: the gradients of a
block's rows are summed, and those rows of table and moments read, updated and
written in place. Nothing else of the table is touched.

Z counts reads, T * K; P those of a block; U is a core's slice, W / C.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops import blocks, precision

# Reads whose sums one matrix product takes, where there is a matrix unit.
PRODUCT_READS = 128


class Factors(NamedTuple):
  """The gradient of a table; T counts all tokens, of all layers that read it.

  row_TK: int32, in [0, I); I of what counts for nothing, such as padding.
  block_TK: int32, in [0, E).
  weight_TKC: float32, one for each core's slice of a row.
  vector_TEW: float32.
  """

  row_TK: jax.Array
  block_TK: jax.Array
  weight_TKC: jax.Array
  vector_TEW: jax.Array


class Table(NamedTuple):
  """A table with Adam's moments, each float32 or uint16 (`precision`).

  values_IW: [I, W].
  mean_IW: the first moment.
  variance: the second moment, [I, W]; or [I] float32, of the mean of a row's
    squares.
  """

  values_IW: jax.Array
  mean_IW: jax.Array
  variance: jax.Array


class AdamW(NamedTuple):
  """AdamW at one step; Python numbers or scalars.

  rate: the learning rate.
  step: counted from 1, for the correction of the moments' bias.
  """

  beta1: float
  beta2: float
  eps: float
  weight_decay: float
  rate: jax.Array
  step: jax.Array


def squared_norm(factors: Factors, reads, num_rows: int):
  """Sum of squares of the table's gradient; float32 scalar.

  Args:
    factors: the gradient.
    reads: of `cpu/sort.sort_by_row`.
    num_rows: I.
  """

  def add(total, row_P, gradient_PW):
    present_P1 = (row_P < num_rows)[:, None]
    return total + jnp.where(present_P1, jnp.square(gradient_PW), 0).sum()

  return blocks.with_budget(
    functools.partial(_scan_rows, add, num_rows), jnp.float32(0), factors, reads
  )


def update_rows(
  table: Table, factors: Factors, reads, scale, adamw: AdamW, key
) -> Table:
  """AdamW on the rows that were read.

  Rows that were not read stay as they are: they neither decay nor move on by
  their momentum, and their moments do not fade.

  Args:
    table: values and moments.
    factors: the gradient.
    reads: of `cpu/sort.sort_by_row`.
    scale: factor on the gradient, of clipping by norm.
    adamw: the rule.
    key: uint32 scalar, from which low precision is rounded.
  Returns:
    The table, updated in place where it is donated.
  """
  num_rows, width = table.values_IW.shape

  def update(table, row_P, gradient_PW, scale, adamw, key):
    rows = jax.tree.map(
      lambda x: jnp.take(x, row_P, axis=0, mode="clip"), table
    )
    rows = _adamw(rows, scale * gradient_PW, adamw)
    noise_PW = precision.noise(key, row_P, width)
    rows = _encode(rows, table, noise_PW)
    return jax.tree.map(
      lambda x, rows: x.at[row_P].set(
        rows, mode="drop", unique_indices=True, indices_are_sorted=True
      ),
      table,
      rows,
    )

  def scan(budget, table, factors, reads, *rule):
    return _scan_rows(
      lambda *block: update(*block, *rule),
      num_rows,
      budget,
      table,
      factors,
      reads,
    )

  return blocks.with_budget(
    scan, table, factors, reads, jnp.float32(scale), adamw, key
  )


def _adamw(rows: Table, gradient_PW, adamw: AdamW) -> Table:
  """Rows after a step; the second moment is per element [P, W] or row [P]."""
  a = adamw
  rows = jax.tree.map(precision.decode, rows)
  square = jnp.square(gradient_PW)
  if rows.variance.ndim == 1:
    square = square.mean(-1)
  mean_PW = a.beta1 * rows.mean_IW + (1 - a.beta1) * gradient_PW
  variance = a.beta2 * rows.variance + (1 - a.beta2) * square
  # Scalars are joined first, as every element would be divided by each.
  divisor = jnp.sqrt(variance * (1 / (1 - a.beta2**a.step))) + a.eps
  rate = a.rate / (1 - a.beta1**a.step)
  values_PW = rows.values_IW
  values_PW -= a.rate * a.weight_decay * values_PW + rate * mean_PW / (
    divisor if divisor.ndim == 2 else divisor[:, None]
  )
  return Table(values_PW, mean_PW, variance)


def _encode(rows: Table, like: Table, noise_PW) -> Table:
  """float32 rows in the dtypes of a table; each array has its own noise."""
  variance = rows.variance
  if like.variance.dtype == jnp.uint16:
    # The sum of the two halves, and not correlated with either.
    both_PW = (noise_PW + (noise_PW >> 16)) & 0xFFFF
    variance = precision.encode_at_random(variance, jnp.uint16, both_PW)
  return Table(
    precision.encode_at_random(
      rows.values_IW, like.values_IW.dtype, noise_PW & 0xFFFF
    ),
    precision.encode_at_random(
      rows.mean_IW, like.mean_IW.dtype, noise_PW >> 16
    ),
    variance,
  )


def _scan_rows(function, num_rows, budget, carry, factors, reads):
  """Scans function over the gradients of the rows read, in blocks.

  Args:
    function: (carry, row_P, gradient_PW) -> carry. The rows ascend; those
      from I on stand for nothing.
    num_rows: I.
    budget: bytes that the gradients of reads and their sums may have. A block
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
  if budget == blocks.ACCELERATOR_BLOCK_BYTES:
    length = PRODUCT_READS * math.ceil(length / PRODUCT_READS)
    sums = _row_sums_by_products
  count = reads[0].size // length + 1
  # At least one read of no row at the end, so that every run is completed.
  padding = count * length - reads[0].size
  row_Z = jnp.pad(reads[0], (0, padding), constant_values=num_rows)
  read_Z = jnp.pad(reads[1], (0, padding))

  def block(carry, inputs):
    outer, run = carry
    row_P, read_P = inputs
    row_P, sum_PW, run = sums(row_P, _gradients(factors, read_P), run, num_rows)
    return (function(outer, row_P, sum_PW), run), None

  run = (row_Z[0], jnp.zeros(width, jnp.float32))
  inputs = (row_Z.reshape(count, length), read_Z.reshape(count, length))
  if count == 1:
    inputs = jax.tree.map(lambda x: x[0], inputs)
    return block((carry, run), inputs)[0][0]
  return jax.lax.scan(block, (carry, run), inputs)[0][0]


def _gradients(factors: Factors, read_P):
  """What single reads add to their rows' gradients, [P, W] float32."""
  num_reads, num_cores = factors.weight_TKC.shape[1:]
  token_P, k_P = jnp.divmod(read_P, num_reads)
  vector_PW = factors.vector_TEW[token_P, factors.block_TK[token_P, k_P]]
  weight_PC = factors.weight_TKC[token_P, k_P]
  gradient_PCU = (
    vector_PW.reshape(-1, num_cores, vector_PW.shape[-1] // num_cores)
    * weight_PC[..., None]
  )
  return gradient_PCU.reshape(vector_PW.shape)


def _row_sums(row_P, gradient_PW, run, num_rows):
  """Sums the gradients of each row; the last row's go on in the next block.

  Args:
    row_P: ascending.
    gradient_PW: of single reads.
    run: (row, sum_W), the row in which the previous block ended.
    num_rows: I.
  Returns:
    (row_P, sum_PW, run): the rows completed, then rows from I on that stand
    for nothing; and the run to go on with.
  """
  length, width = gradient_PW.shape
  previous_P = jnp.concatenate([run[0][None], row_P[:-1]])
  # 0 is the run that goes on; S = P + 1 is the most there can be.
  segment_P = jnp.cumsum(row_P != previous_P)
  sum_SW = jnp.zeros((length + 1, width), jnp.float32).at[0].set(run[1])
  sum_SW = sum_SW.at[segment_P].add(
    gradient_PW, mode="promise_in_bounds", indices_are_sorted=True
  )
  row_S = jnp.zeros(length + 1, jnp.int32).at[0].set(run[0])
  row_S = row_S.at[segment_P].set(row_P, mode="promise_in_bounds")
  slot_P = jnp.arange(length, dtype=jnp.int32)
  last = segment_P[-1]
  row_S = jnp.where(slot_P < last, row_S[:-1], num_rows + slot_P)
  return row_S, sum_SW[:-1], (row_P[-1], sum_SW[last])


def _row_sums_by_products(row_P, gradient_PW, run, num_rows):
  """As `_row_sums`, without a scatter, which matrix units do one by one.

  Sums to the left inside a row come from products with 0-1 matrices in groups
  of `PRODUCT_READS` reads, G of J, and a scan over the groups.
  """
  length, width = gradient_PW.shape
  row_GJ = row_P.reshape(-1, PRODUCT_READS)
  same_GJJ = row_GJ[:, :, None] == row_GJ[:, None, :]
  before_JJ = jnp.tri(PRODUCT_READS, dtype=bool)
  sum_GJW = jnp.einsum(
    "GJj,GjW->GJW",
    (same_GJJ & before_JJ[None]).astype(jnp.float32),
    gradient_PW.reshape(*row_GJ.shape, width),
    precision=jax.lax.Precision.HIGHEST,
  )
  # What the open row of each group sums to, from the first group on.
  previous_G = jnp.concatenate([run[0][None], row_GJ[:-1, -1]])
  whole_G = row_GJ[:, -1] == previous_G

  def join(left, right):
    (left_whole, left_sum), (right_whole, right_sum) = left, right
    return (
      left_whole & right_whole,
      right_sum + jnp.where(right_whole[..., None], left_sum, 0),
    )

  whole_G, open_GW = jax.lax.associative_scan(join, (whole_G, sum_GJW[:, -1]))
  open_GW += jnp.where(whole_G[:, None], run[1][None], 0)
  carried_GW = jnp.concatenate([run[1][None], open_GW[:-1]])
  goes_on_GJ = row_GJ == previous_G[:, None]
  sum_GJW += jnp.where(goes_on_GJ[..., None], carried_GW[:, None], 0)
  sum_PW = sum_GJW.reshape(length, width)
  # A row is completed where another follows; those places first, in order.
  previous_P = jnp.concatenate([run[0][None], row_P[:-1]])
  before_PW = jnp.concatenate([run[1][None], sum_PW[:-1]])
  slot_P = jnp.arange(length, dtype=jnp.int32)
  place_P = jnp.sort(jnp.where(previous_P != row_P, slot_P, slot_P + length))
  complete_P = place_P < length
  place_P %= length
  row_P, last = (
    jnp.where(complete_P, previous_P[place_P], num_rows + slot_P),
    row_P[-1],
  )
  return row_P, before_PW[place_P], (last, sum_PW[-1])


def update_rows_reference(
  table: Table, factors: Factors, scale, adamw: AdamW
) -> Table:
  """`update_rows` of float32 from the definition: slow, a dense gradient."""
  f = factors
  num_rows, width = table.values_IW.shape
  weight_TKW = jnp.repeat(
    f.weight_TKC, width // f.weight_TKC.shape[-1], axis=-1
  )
  token_T1 = jnp.arange(f.row_TK.shape[0])[:, None]
  gradient_IW = (
    jnp.zeros((num_rows, width), jnp.float32)
    .at[f.row_TK]
    .add(weight_TKW * f.vector_TEW[token_T1, f.block_TK])
  )
  was_read_I = jnp.zeros(num_rows, bool).at[f.row_TK].set(True)
  updated = _adamw(table, scale * gradient_IW, adamw)
  return jax.tree.map(
    lambda new, old: jnp.where(
      was_read_I.reshape(-1, *(1,) * (new.ndim - 1)), new, old
    ),
    updated,
    table,
  )
