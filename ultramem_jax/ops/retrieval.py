"""Retrieval: from queries and keys to the m best cells of the grid."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ultramem_jax.ops import candidates, chunks, precision, retrieval_gradient
from ultramem_jax.ops.cpu import top_k

# A chunk of positions reads all keys. Where those exceed the bytes that a chunk
# may hold, its scores may exceed them too, up to this factor.
LARGEST_CHUNK = 8


class Retrieved(NamedTuple):
  """The chosen cells of each head, best first.

  row_BTAM, column_BTAM: [B, T, A, M] int32 in [0, N).
  score_BTAMC: [B, T, A, M, C] float32, each core's score; the sum over C ranks
    the cells.
  """

  row_BTAM: jax.Array
  column_BTAM: jax.Array
  score_BTAMC: jax.Array


def retrieve(
  query_BTPGRK: jax.Array,
  keys_PARNK: jax.Array,
  m: int,
  core_CARR: jax.Array | None = None,
  filter_PAR: jax.Array | None = None,
  scale_PARN: jax.Array | None = None,
  choose: candidates.Choose = top_k.top_m,
) -> Retrieved:
  """Finds the m best cells of the N x N grid of key pairs, for each head.

  With a Tucker core (TDQKR and MCS, paper sections 3.3 and 3.5): the filter
  keeps m rows and m columns, whose m x m cells are scored exactly,
  S_row[:, a]^T (sum_c core_c) S_col[:, b]; the best m remain. This filter
  defines the result, which is not the top m of the full grid. Without a core
  (product keys, arXiv 1907.05242): S_row[a] + S_col[b], for which the filter
  loses nothing. Runs in chunks of positions.

  Args:
    query_BTPGRK: [B, T, P, G, R, K] normalized queries; R may be 1, one query
      for all ranks. G divides A, and head a reads query a // (A / G).
    keys_PARNK: [P, A, R, N, K] keys, of the queries' dtype.
    m: M, cells kept per head; at most N.
    core_CARR: [C, A, R, R] float32; None: the score is the sum.
    filter_PAR: [P, A, R] float32, u and t stacked; with a core only.
    scale_PARN: [P, A, R, N] float32, not 0: factors of the keys' scores, with
      which keys need not be normalized (`layers.keys.KeyNorm`). None: all 1.
    choose: finds the best of many scores.
  Returns:
    The cells, C = 1 without a core. Scores are differentiable in query, keys,
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
  scale_PGJRN = None
  if scale_PARN is not None:
    scale_PGJRN = scale_PARN.reshape(keys_PGJRNK.shape[:5])
  found: Any = _retrieve(
    m, choose, query_BTPGRK, keys_PGJRNK, scale_PGJRN, core_CARR, filter_PGJR
  )
  index_BTPAM, side_BTPARM = found
  return _retrieved(index_BTPAM, side_BTPARM, core_CARR)


def _retrieved(index_BTPAM, side_BTPARM, core_CARR) -> Retrieved:
  row_BTAM, column_BTAM = jnp.unstack(index_BTPAM, axis=2)
  score_BTAMC = candidates.cell_scores(side_BTPARM, core_CARR)
  return Retrieved(row_BTAM, column_BTAM, score_BTAMC)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _retrieve(
  m, choose, query_BTPGRK, keys_PGJRNK, scale_PGJRN, core_CARR, filter_PGJR
) -> tuple[jax.Array, jax.Array]:
  """Returns the best cells [B, T, P, A, M], and scores [B, T, P, A, R, M]."""
  return chunks.with_budget(
    functools.partial(_retrieve_in_chunks, m, choose),
    query_BTPGRK,
    keys_PGJRNK,
    scale_PGJRN,
    core_CARR,
    filter_PGJR,
  )


def _retrieve_in_chunks(
  m,
  choose,
  budget,
  query_BTPGRK,
  keys_PGJRNK,
  scale_PGJRN,
  core_CARR,
  filter_PGJR,
):
  sides, groups, sharing, rank, num_keys, _ = keys_PGJRNK.shape
  heads = groups * sharing
  budget = min(max(budget, 4 * keys_PGJRNK.size), LARGEST_CHUNK * budget)
  batch, positions = query_BTPGRK.shape[:2]
  chunk_length = lambda pairs: chunks.chunk_length(
    budget, batch, positions, 4 * (pairs * rank * num_keys + heads * m * m)
  )
  length = chunk_length(sides * heads)
  # Matmuls of many positions are faster: where not all positions fit, a chunk
  # holds the scores of one side and head at a time.
  in_turn = length < positions
  if in_turn:
    length = chunk_length(1)

  def retrieve_chunk(_, query_BTPGRK):
    index_BTPAM, chosen_BTPARM = candidates.filter_keys(
      query_BTPGRK, keys_PGJRNK, scale_PGJRN, filter_PGJR, m, in_turn, choose
    )
    return None, candidates.refine(
      index_BTPAM, chosen_BTPARM, core_CARR, m, choose
    )

  return chunks.scan_chunks(retrieve_chunk, None, query_BTPGRK, length)[1]


def _retrieve_forward(m, choose, *inputs):
  found: Any = _retrieve(m, choose, *inputs)
  # The scores of all keys are not kept: their gradient needs only the index.
  return found, (inputs, found[0])


def _retrieve_backward(m, choose, residuals, gradients):
  del m, choose
  inputs, index_BTPAM = residuals
  query_BTPGRK, keys_PGJRNK, scale_PGJRN, *choice = inputs
  return (
    *retrieval_gradient.gradients(
      query_BTPGRK, keys_PGJRNK, scale_PGJRN, index_BTPAM, gradients[1]
    ),
    # Core and filter take part in the choice only.
    *jax.tree.map(jnp.zeros_like, choice),
  )


_retrieve.defvjp(_retrieve_forward, _retrieve_backward)


def merge_keys(keys_PARNK: jax.Array, filter_PAR: jax.Array) -> jax.Array:
  """Returns keys [P, A, N, K] whose products with a query are filter scores.

  For one query that all ranks share.
  """
  return jnp.einsum(
    "PARNK,PAR->PANK", keys_PARNK, filter_PAR, precision=precision.EXACT
  )


def retrieve_merged(
  query_BTPGRK: jax.Array,
  keys_PARNK: jax.Array,
  merged_PANK: jax.Array,
  m: int,
  core_CARR: jax.Array,
) -> Retrieved:
  """Computes `retrieve` for a few tokens, with keys that were merged before.

  For one query that all ranks share. The filter reads the merged keys, one
  R-th of all keys; then each rank of the chosen keys is scored. Equal up to
  the rounding of float32, and not differentiable.

  Args:
    query_BTPGRK, keys_PARNK, m, core_CARR: see `retrieve`; R of the query may
      be 1, and only its first rank is read.
    merged_PANK: of `merge_keys`.
  """
  sides, heads, rank, num_keys, width = keys_PARNK.shape
  groups = query_BTPGRK.shape[3]
  index_BTPAM, _ = candidates.filter_keys(
    query_BTPGRK[..., :1, :],
    merged_PANK.reshape(sides, groups, -1, 1, num_keys, width),
    None,
    jnp.ones((sides, groups, heads // groups, 1), jnp.float32),
    m,
  )
  first_PAR = jnp.arange(sides * heads * rank, dtype=jnp.int32).reshape(
    sides, heads, rank
  )
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
    precision=precision.exact(chosen_BTPARMK, query_BTPAK),
    preferred_element_type=jnp.float32,
  )
  index_BTPAM, side_BTPARM = candidates.refine(
    index_BTPAM, chosen_BTPARM, core_CARR, m
  )
  return _retrieved(index_BTPAM, side_BTPARM, core_CARR)


def retrieve_reference(
  query_BTPGRK: jax.Array,
  keys_PARNK: jax.Array,
  m: int,
  core_CARR: jax.Array | None = None,
  filter_PAR: jax.Array | None = None,
) -> Retrieved:
  """Computes `retrieve` from its definition: slow, no custom gradient.

  Scores every cell of the N x N grid, and masks those outside the filter's m
  rows and m columns.
  """
  rank, heads = keys_PARNK.shape[2], keys_PARNK.shape[1]
  query_BTPARK = jnp.repeat(query_BTPGRK, heads // query_BTPGRK.shape[3], 3)
  query_BTPARK = jnp.broadcast_to(
    query_BTPARK, (*query_BTPARK.shape[:4], rank, query_BTPARK.shape[-1])
  )
  side_BTPARN = jnp.einsum("BTPARK,PARNK->BTPARN", query_BTPARK, keys_PARNK)
  if core_CARR is None:
    filter_PAR = jnp.ones((2, heads, 1), jnp.float32)
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
