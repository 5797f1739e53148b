"""Retrieval: from queries and keys to the top-m cells of the grid.

Letters beyond DESIGN's: P the two sides (0 row, 1 column), G distinct
queries, J heads that share a query (A = G * J, head a reads query a // J).
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.ops import blocks, lookup, precision
from ultramem_jax.ops.cpu import matmul as few_rows
from ultramem_jax.ops.cpu.top_k import top_m

# A block of positions reads all keys: where they are larger than the budget of
# a block, its scores may be so too, up to as many times the budget.
LARGEST_BLOCK = 8


class Retrieved(NamedTuple):
  """The chosen cells of each head, best first.

  row_BTAM, column_BTAM: [B, T, A, M] int32 in [0, N).
  score_BTAMC: [B, T, A, M, C] float32, the score given by each core; their
    sum over C ranks the cells.
  """

  row_BTAM: jax.Array
  column_BTAM: jax.Array
  score_BTAMC: jax.Array


def filter_keys(
  query_BTPGRK,
  keys_PGJRNK,
  scale_PGJRN,
  filter_PGJR,
  m: int,
  in_turn: bool = False,
):
  """Keeps the m keys of each side that score highest under the filter.

  Args:
    query_BTPGRK: [B, T, P, G, R, K] float.
    keys_PGJRNK: [P, G, J, R, N, K] float.
    scale_PGJRN: [P, G, J, R, N] float32, factors of the scores; or None.
    filter_PGJR: [P, G, J, R] float32; a key's rank is decided by the sum over
      r of filter[r] times its score of rank r.
    m: keys kept per side.
    in_turn: one side and head after the other: only its scores are held.
  Returns:
    index_BTPAM, int32, best first, and their scores chosen_BTPARM, float32.
  """
  batch, length = query_BTPGRK.shape[:2]
  pairs, rank = keys_PGJRNK.shape[:3], keys_PGJRNK.shape[3]
  query_PGJRBTK = jnp.broadcast_to(
    jnp.moveaxis(query_BTPGRK, (0, 1), (-3, -2))[:, :, None],
    (*pairs, rank, batch, length, query_BTPGRK.shape[-1]),
  )
  by_pair = query_PGJRBTK, keys_PGJRNK, scale_PGJRN, filter_PGJR
  if not in_turn:
    found = _filter(*by_pair, m)
  else:
    found = jax.lax.map(
      lambda pair: _filter(
        *jax.tree.map(lambda x: x[None, None, None], pair), m
      ),
      jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), by_pair),
    )
    found = jax.tree.map(lambda x: x.reshape(*pairs, *x.shape[4:]), found)
  index_PGJBTM, chosen_PGJBTRM = found
  return _to_heads(index_PGJBTM), _to_heads(chosen_PGJBTRM)


def _filter(query_PGJRBTK, keys_PGJRNK, scale_PGJRN, filter_PGJR, m):
  """index [P, G, J, B, T, M] of the keys kept, and scores [..., T, R, M]."""
  *pairs, rank, num_keys, width = keys_PGJRNK.shape
  batch, length = query_PGJRBTK.shape[-3:-1]
  # One axis (Z) of matrices, and one of positions (L): of several, XLA's CPU
  # compiler would transpose all keys.
  scores_PGJRBTN = few_rows.dot_transposed(
    query_PGJRBTK.reshape(-1, batch * length, width),
    keys_PGJRNK.reshape(-1, num_keys, width),
    jnp.float32,
  ).reshape(*pairs, rank, batch, length, num_keys)
  weight_PGJRN = filter_PGJR[..., None]
  if scale_PGJRN is not None:
    weight_PGJRN *= scale_PGJRN
  index_PGJBTM = top_m(
    sum(
      weight_PGJRN[:, :, :, r, None, None] * scores_PGJRBTN[:, :, :, r]
      for r in range(rank)
    ),
    m,
  )
  index_PGJ1BTM = index_PGJBTM[:, :, :, None]
  chosen_PGJRBTM = jnp.take_along_axis(scores_PGJRBTN, index_PGJ1BTM, axis=-1)
  if scale_PGJRN is not None:
    chosen_PGJRBTM *= jnp.take_along_axis(
      scale_PGJRN[:, :, :, :, None, None], index_PGJ1BTM, axis=-1
    )
  return index_PGJBTM, jnp.moveaxis(chosen_PGJRBTM, 3, -2)


def _to_heads(x_PGJBT):
  """[P, G, J, B, T, ...] -> [B, T, P, A, ...]."""
  x_PABT = x_PGJBT.reshape(x_PGJBT.shape[0], -1, *x_PGJBT.shape[3:])
  return jnp.moveaxis(x_PABT, (2, 3), (0, 1))


def _take(x, index_BTAM):
  """Elements of x [B, T, A, ..., n] along its last axis, at [B, T, A, M]."""
  extra = x.ndim - index_BTAM.ndim
  index = jnp.expand_dims(index_BTAM, range(3, 3 + extra))
  return jnp.take_along_axis(x, index, axis=-1)


def _refine(index_BTPAM, chosen_BTPARM, core_CARR, m):
  """Exact scores of the M x M candidates; keeps the best m of them.

  Returns:
    index [B, T, P, A, m] of the best cells and their scores by side
    [B, T, P, A, R, m].
  """
  row_BTARM, column_BTARM = jnp.unstack(chosen_BTPARM, axis=2)
  num_candidates = chosen_BTPARM.shape[-1]
  if core_CARR is None:
    # Both sides are sorted: a cell (i, j) is no better than any (i', j') with
    # i' <= i and j' <= j, so it can only count if those are at most m.
    grid_i, grid_j = np.indices((num_candidates, num_candidates)) + 1
    cells_L = np.flatnonzero(grid_i * grid_j <= m)
    row_L, column_L = np.divmod(cells_L, num_candidates)
    grid_BTAL = row_BTARM[..., 0, row_L] + column_BTARM[..., 0, column_L]
    cell_BTAM = jnp.asarray(cells_L, jnp.int32)[top_m(grid_BTAL, m)]
  else:
    folded_BTARM = jnp.einsum(
      "BTARm,ARr->BTArm", row_BTARM, core_CARR.sum(0), precision=precision.EXACT
    )
    grid_BTAMM = sum(
      folded_BTARM[..., r, :, None] * column_BTARM[..., r, None, :]
      for r in range(folded_BTARM.shape[-2])
    )
    cell_BTAM = top_m(grid_BTAMM.reshape(*grid_BTAMM.shape[:3], -1), m)
  row_BTAM, column_BTAM = jnp.divmod(cell_BTAM, num_candidates)
  index_BTPAM = jnp.stack(
    [
      _take(index_BTPAM[:, :, 0], row_BTAM),
      _take(index_BTPAM[:, :, 1], column_BTAM),
    ],
    axis=2,
  )
  side_BTPARM = jnp.stack(
    [_take(row_BTARM, row_BTAM), _take(column_BTARM, column_BTAM)], axis=2
  )
  return index_BTPAM, side_BTPARM


def _cell_scores(side_BTPARM, core_CARR):
  """Each core's score of cells, [B, T, A, M, C], from those by side."""
  row_BTARM, column_BTARM = jnp.unstack(side_BTPARM, axis=2)
  if core_CARR is None:
    return (row_BTARM + column_BTARM).swapaxes(-1, -2)
  return jnp.einsum(
    "BTARM,CARr,BTArM->BTAMC",
    row_BTARM,
    core_CARR,
    column_BTARM,
    precision=precision.EXACT,
  )


def retrieve(
  query_BTPGRK,
  keys_PARNK,
  m: int,
  core_CARR=None,
  filter_PAR=None,
  scale_PARN=None,
):
  """Finds the m best cells of the N x N grid of key pairs, for each head.

  With a Tucker core (TDQKR and MCS, paper sections 3.3 and 3.5): the filter
  keeps m rows and m columns, whose m x m cells are scored exactly,
  S_row[:, a]^T (sum_c core_c) S_col[:, b]; the best m remain. The result is
  defined by this filter: it is not the top m of the full grid. Without a core
  (product keys, arXiv 1907.05242): S_row[a] + S_col[b], for which the filter
  loses nothing. Runs in blocks of positions.

  Args:
    query_BTPGRK: [B, T, P, G, R, K] normalized queries; R may be 1, one query
      for all ranks. G divides A.
    keys_PARNK: [P, A, R, N, K] keys, of the queries' dtype.
    m: M, cells kept per head; at most N.
    core_CARR: [C, A, R, R] float32, or None for the sum.
    filter_PAR: [P, A, R] float32, u and t stacked; with a core only.
    scale_PARN: [P, A, R, N] float32, not 0: factors of the keys' scores, which
      spare the making of normalized keys (`layers.norm.KeyNorm`). None for 1.
  Returns:
    Retrieved, C = 1 without a core. Scores are differentiable in query, keys,
    core and scale; the choice is not.
  """
  sides, heads, rank, num_keys, width = keys_PARNK.shape
  groups = query_BTPGRK.shape[3]
  if filter_PAR is None:
    filter_PAR = jnp.ones((sides, heads, rank), jnp.float32)
  query_BTPGRK = jnp.broadcast_to(
    query_BTPGRK, (*query_BTPGRK.shape[:4], rank, width)
  )
  keys_PGJRNK = keys_PARNK.reshape(sides, groups, -1, rank, num_keys, width)
  filter_PGJR = jax.lax.stop_gradient(filter_PAR).reshape(keys_PGJRNK.shape[:4])
  if scale_PARN is not None:
    scale_PARN = scale_PARN.reshape(keys_PGJRNK.shape[:5])
  index_BTPAM, side_BTPARM = _retrieve(
    m, query_BTPGRK, keys_PGJRNK, scale_PARN, core_CARR, filter_PGJR
  )
  row_BTAM, column_BTAM = jnp.unstack(index_BTPAM, axis=2)
  return Retrieved(row_BTAM, column_BTAM, _cell_scores(side_BTPARM, core_CARR))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _retrieve(
  m, query_BTPGRK, keys_PGJRNK, scale_PGJRN, core_CARR, filter_PGJR
):
  """The best cells: their index [B, T, P, A, M], scores [B, T, P, A, R, M]."""
  return blocks.with_budget(
    functools.partial(_retrieve_in_blocks, m),
    query_BTPGRK,
    keys_PGJRNK,
    scale_PGJRN,
    core_CARR,
    filter_PGJR,
  )


def _retrieve_in_blocks(
  m, budget, query_BTPGRK, keys_PGJRNK, scale_PGJRN, core_CARR, filter_PGJR
):
  sides, groups, sharing, rank, num_keys, _ = keys_PGJRNK.shape
  heads = groups * sharing
  budget = min(max(budget, 4 * keys_PGJRNK.size), LARGEST_BLOCK * budget)
  tokens = query_BTPGRK.shape[:2]
  block_length = lambda pairs: blocks.block_length(
    budget, *tokens, 4 * (pairs * rank * num_keys + heads * m * m)
  )
  block = block_length(sides * heads)
  # Matmuls of many positions are faster: where not all fit, a block holds the
  # scores of one side and head at a time.
  in_turn = block < tokens[1]
  if in_turn:
    block = block_length(1)

  def retrieve_block(_, query_BTPGRK):
    index_BTPAM, chosen_BTPARM = filter_keys(
      query_BTPGRK, keys_PGJRNK, scale_PGJRN, filter_PGJR, m, in_turn
    )
    return None, _refine(index_BTPAM, chosen_BTPARM, core_CARR, m)

  return blocks.scan_blocks(retrieve_block, None, query_BTPGRK, block)[1]


def _retrieve_forward(m, *inputs):
  found = _retrieve(m, *inputs)
  # The scores of all keys are not kept: their gradient needs only the index.
  return found, (inputs, found[0])


def _retrieve_backward(m, residuals, gradients):
  del m
  inputs, index_BTPAM = residuals
  query_BTPGRK, keys_PGJRNK, scale_PGJRN, *choice = inputs
  gradient_BTPARM = gradients[1]
  if scale_PGJRN is not None:
    scale_PAR = scale_PGJRN.reshape(
      scale_PGJRN.shape[0], -1, *scale_PGJRN.shape[3:]
    )[None, None]
    gradient_BTPARM *= jnp.take_along_axis(
      scale_PAR, index_BTPAM[:, :, :, :, None], axis=-1
    )
  query, keys = jax.lax.platform_dependent(
    query_BTPGRK,
    keys_PGJRNK,
    index_BTPAM,
    gradient_BTPARM,
    cpu=_gradient_by_rows,
    default=_gradient_by_products,
  )
  scale = None
  if scale_PGJRN is not None:
    # Of a key and its scale the score has the product.
    products_PGJRNK = jnp.float32(keys) * jnp.float32(keys_PGJRNK)
    scale = products_PGJRNK.sum(-1) / scale_PGJRN
  # The core takes part in the choice only.
  return query, keys, scale, *jax.tree.map(jnp.zeros_like, choice)


def _gradient_by_rows(query_BTPGRK, keys_PGJRNK, index_BTPAM, gradient_BTPARM):
  """Gradients of queries and keys from those of the chosen scores.

  A chosen score is the product of a query with one key: the keys are a table
  of which `lookup.dot_rows` reads rows. Few keys are chosen, so that on a CPU
  this is several times faster than products with the gradients of all scores.
  """
  batch, length, sides, groups, rank, width = query_BTPGRK.shape
  first_PGJR = keys_PGJRNK.shape[4] * jnp.arange(
    math.prod(keys_PGJRNK.shape[:4])
  ).reshape(keys_PGJRNK.shape[:4])
  to_queries = lambda x_BTPGJRM: x_BTPGJRM.swapaxes(4, 5).reshape(
    batch, length * sides * groups * rank, -1
  )
  index_BTPGJ1M = index_BTPAM.reshape(
    batch, length, sides, groups, -1, 1, index_BTPAM.shape[-1]
  )
  _, pullback = jax.vjp(
    lambda keys_PGJRNK, query_BTPGRK: lookup.dot_rows(
      keys_PGJRNK.reshape(-1, width).astype(jnp.float32),
      to_queries(index_BTPGJ1M + first_PGJR[None, None, ..., None]),
      query_BTPGRK.reshape(batch, -1, width),
    ),
    keys_PGJRNK,
    query_BTPGRK,
  )
  keys, query = pullback(
    to_queries(
      gradient_BTPARM.reshape(
        *index_BTPGJ1M.shape[:5], *gradient_BTPARM.shape[4:]
      )
    )
  )
  return query, keys


def _gradient_by_products(
  query_BTPGRK, keys_PGJRNK, index_BTPAM, gradient_BTPARM
):
  """The same by matmuls, in blocks of positions."""
  sides, groups, sharing, rank, num_keys, _ = keys_PGJRNK.shape

  def block_gradient(keys_gradient_PGJRNK, inputs):
    query_BTPGRK, index_BTPAM, gradient_BTPARM = inputs
    index_PABTM = jnp.moveaxis(index_BTPAM, (0, 1), (2, 3))
    gradient_PARBTM = jnp.moveaxis(gradient_BTPARM, (0, 1), (3, 4))
    shape = gradient_PARBTM.shape[:-1]
    position = (axis[..., None] for axis in jnp.ix_(*map(jnp.arange, shape)))
    # A key is chosen once for each of its cells.
    scores_PARBTN = (
      jnp.zeros((*shape, num_keys), jnp.float32)
      .at[*position, index_PABTM[:, :, None]]
      .add(gradient_PARBTM, mode="promise_in_bounds")
    )
    scores_PGJRBTN = scores_PARBTN.reshape(
      sides, groups, sharing, *scores_PARBTN.shape[2:]
    ).astype(keys_PGJRNK.dtype)
    query_gradient_PGJRBTK = jnp.einsum(
      "PGJRBTN,PGJRNK->PGJRBTK",
      scores_PGJRBTN,
      keys_PGJRNK,
      preferred_element_type=jnp.float32,
    )
    keys_gradient_PGJRNK += jnp.einsum(
      "PGJRBTN,BTPGRK->PGJRNK",
      scores_PGJRBTN,
      query_BTPGRK,
      preferred_element_type=jnp.float32,
    )
    query_gradient_BTPGRK = jnp.moveaxis(
      query_gradient_PGJRBTK.sum(2), (-3, -2), (0, 1)
    )
    return keys_gradient_PGJRNK, query_gradient_BTPGRK.astype(
      query_BTPGRK.dtype
    )

  block = blocks.block_length(
    blocks.ACCELERATOR_BLOCK_BYTES,
    *query_BTPGRK.shape[:2],
    4 * sides * groups * sharing * rank * num_keys,
  )
  keys, query = blocks.scan_blocks(
    block_gradient,
    jnp.zeros(keys_PGJRNK.shape, jnp.float32),
    (query_BTPGRK, index_BTPAM, gradient_BTPARM),
    block,
  )
  return query, keys.astype(keys_PGJRNK.dtype)


_retrieve.defvjp(_retrieve_forward, _retrieve_backward)


def merge_keys(keys_PARNK, filter_PAR):
  """Keys whose inner product with a query is their score under the filter.

  For one query that all ranks share; [P, A, N, K].
  """
  return jnp.einsum(
    "PARNK,PAR->PANK", keys_PARNK, filter_PAR, precision=precision.EXACT
  )


def retrieve_merged(query_BTPGRK, keys_PARNK, merged_PANK, m: int, core_CARR):
  """`retrieve` for a few tokens, with keys that were merged once before.

  Where all ranks share one query. Filters by the merged keys, an R-th of
  them all, and scores each rank of the chosen keys alone. Equal up to the
  rounding of float32, and not differentiable.

  Args:
    query_BTPGRK, keys_PARNK, m, core_CARR: see `retrieve`; one query for all
      ranks.
    merged_PANK: of `merge_keys`.
  Returns:
    Retrieved.
  """
  sides, heads, rank, num_keys, width = keys_PARNK.shape
  groups = query_BTPGRK.shape[3]
  index_BTPAM, _ = filter_keys(
    query_BTPGRK[..., :1, :],
    merged_PANK.reshape(sides, groups, -1, 1, num_keys, width),
    None,
    jnp.ones((sides, groups, heads // groups, 1)),
    m,
  )
  first_PAR = jnp.arange(sides * heads * rank).reshape(sides, heads, rank)
  row_BTPARM = (
    num_keys * first_PAR[None, None, ..., None] + index_BTPAM[:, :, :, :, None]
  )
  chosen_BTPARMK = jnp.take(
    keys_PARNK.reshape(-1, width), row_BTPARM, axis=0, mode="clip"
  )
  query_BTPAK = jnp.repeat(query_BTPGRK[..., 0, :], heads // groups, axis=3)
  chosen_BTPARM = jnp.einsum(
    "BTPARMK,BTPAK->BTPARM",
    chosen_BTPARMK,
    query_BTPAK,
    preferred_element_type=jnp.float32,
  )
  index_BTPAM, side_BTPARM = _refine(index_BTPAM, chosen_BTPARM, core_CARR, m)
  row_BTAM, column_BTAM = jnp.unstack(index_BTPAM, axis=2)
  return Retrieved(row_BTAM, column_BTAM, _cell_scores(side_BTPARM, core_CARR))


def retrieve_reference(
  query_BTPGRK, keys_PARNK, m, core_CARR=None, filter_PAR=None
):
  """`retrieve` written from the definition: slow, plain, no custom gradient.

  Every cell of the N x N grid is scored, and those outside the filter's m
  rows and m columns are masked away.
  """
  rank, heads = keys_PARNK.shape[2], keys_PARNK.shape[1]
  query_BTPARK = jnp.repeat(query_BTPGRK, heads // query_BTPGRK.shape[3], 3)
  query_BTPARK = jnp.broadcast_to(
    query_BTPARK, (*query_BTPARK.shape[:4], rank, query_BTPARK.shape[-1])
  )
  side_BTPARN = jnp.einsum("BTPARK,PARNK->BTPARN", query_BTPARK, keys_PARNK)
  if core_CARR is None:
    filter_PAR = jnp.ones((2, heads, 1))
    row_BTAN, column_BTAN = jnp.unstack(side_BTPARN[..., 0, :], axis=2)
    grid_BTANN = row_BTAN[..., :, None] + column_BTAN[..., None, :]
    grid_BTANNC = grid_BTANN[..., None]
  else:
    grid_BTANNC = jnp.einsum(
      "BTARN,CARr,BTArn->BTANnC",
      side_BTPARN[:, :, 0],
      core_CARR,
      side_BTPARN[:, :, 1],
    )
  filtered_BTPAN = jnp.einsum("BTPARN,PAR->BTPAN", side_BTPARN, filter_PAR)
  num_keys = keys_PARNK.shape[3]
  kept_BTPAN = jax.nn.one_hot(
    jax.lax.top_k(filtered_BTPAN, m)[1], num_keys, dtype=bool
  ).any(-2)
  kept_row_BTAN, kept_column_BTAN = jnp.unstack(kept_BTPAN, axis=2)
  candidate_BTANN = kept_row_BTAN[..., None] & kept_column_BTAN[..., None, :]
  total_BTANN = jnp.where(candidate_BTANN, grid_BTANNC.sum(-1), -jnp.inf)
  flat = (*total_BTANN.shape[:3], num_keys * num_keys)
  cell_BTAM = jax.lax.top_k(total_BTANN.reshape(flat), m)[1]
  score_BTAMC = jnp.take_along_axis(
    grid_BTANNC.reshape(*flat, -1), cell_BTAM[..., None], axis=-2
  )
  return Retrieved(cell_BTAM // num_keys, cell_BTAM % num_keys, score_BTAMC)
