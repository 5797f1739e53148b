"""Candidate cells: the two stages in which a head finds its m best cells.

The filter keeps M rows and M columns; refining scores the M x M cells where
they meet, the candidates, and keeps M of them (paper section 3.3).
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ultramem_jax.ops import precision
from ultramem_jax.ops.cpu import matmul, top_k

# (scores [..., N], m) -> the indices [..., m] of the best, as `top_k.top_m`.
Choose = Callable[[jax.Array, int], jax.Array]


def filter_keys(
  query_BTPGRK: jax.Array,
  keys_PGJRNK: jax.Array,
  scale_PGJRN: jax.Array | None,
  filter_PGJR: jax.Array,
  m: int,
  in_turn: bool = False,
  choose: Choose = top_k.top_m,
) -> tuple[jax.Array, jax.Array]:
  """Returns the m keys of each side that score highest under the filter.

  Args:
    query_BTPGRK: [B, T, P, G, R, K] float.
    keys_PGJRNK: [P, G, J, R, N, K] float; head g J + j reads query g.
    scale_PGJRN: [P, G, J, R, N] float32, factors of the scores; None: all 1.
    filter_PGJR: [P, G, J, R] float32. The sum over r of filter[r] times a
      key's score of rank r decides the key's place.
    m: M, keys kept per side.
    in_turn: compute one side and head after the other, and hold the scores of
      one at a time.
    choose: finds the m best of many scores.
  Returns:
    (index_BTPAM, chosen_BTPARM): the keys, int32, best first; and their scores,
    float32.
  """
  batch, length = query_BTPGRK.shape[:2]
  pairs, rank = keys_PGJRNK.shape[:3], keys_PGJRNK.shape[3]
  query_PGJRBTK = jnp.broadcast_to(
    jnp.moveaxis(query_BTPGRK, (0, 1), (-3, -2))[:, :, None],
    (*pairs, rank, batch, length, query_BTPGRK.shape[-1]),
  )
  by_pair = query_PGJRBTK, keys_PGJRNK, scale_PGJRN, filter_PGJR
  if not in_turn:
    found = _filter(*by_pair, m=m, choose=choose)
  else:
    found = jax.lax.map(
      lambda pair: _filter(
        *jax.tree.map(lambda x: x[None, None, None], pair), m=m, choose=choose
      ),
      jax.tree.map(lambda x: x.reshape(-1, *x.shape[3:]), by_pair),
    )
    found = jax.tree.map(lambda x: x.reshape(*pairs, *x.shape[4:]), found)
  index_PGJBTM, chosen_PGJBTRM = found
  return _to_heads(index_PGJBTM), _to_heads(chosen_PGJBTRM)


def _filter(query_PGJRBTK, keys_PGJRNK, scale_PGJRN, filter_PGJR, m, choose):
  """Returns the keys kept [P, G, J, B, T, M], and scores [..., T, R, M]."""
  *pairs, rank, num_keys, width = keys_PGJRNK.shape
  batch, length = query_PGJRBTK.shape[-3:-1]
  # One axis of matrices and one of positions: with several of either, XLA's
  # CPU compiler would transpose all keys.
  scores_PGJRBTN = matmul.dot_transposed(
    query_PGJRBTK.reshape(-1, batch * length, width),
    keys_PGJRNK.reshape(-1, num_keys, width),
    jnp.float32,
    precision.exact(query_PGJRBTK, keys_PGJRNK),
  ).reshape(*pairs, rank, batch, length, num_keys)
  weight_PGJRN = filter_PGJR[..., None]
  if scale_PGJRN is not None:
    weight_PGJRN *= scale_PGJRN
  filtered_PGJBTN: Any = sum(
    weight_PGJRN[:, :, :, r, None, None] * scores_PGJRBTN[:, :, :, r]
    for r in range(rank)
  )
  index_PGJBTM = choose(filtered_PGJBTN, m)
  index_PGJ1BTM = index_PGJBTM[:, :, :, None]
  chosen_PGJRBTM = jnp.take_along_axis(scores_PGJRBTN, index_PGJ1BTM, axis=-1)
  if scale_PGJRN is not None:
    chosen_PGJRBTM *= jnp.take_along_axis(
      scale_PGJRN[:, :, :, :, None, None], index_PGJ1BTM, axis=-1
    )
  return index_PGJBTM, jnp.moveaxis(chosen_PGJRBTM, 3, -2)


def _to_heads(x_PGJBT):
  """Reorders [P, G, J, B, T, ...] to [B, T, P, A, ...]."""
  x_PABT = x_PGJBT.reshape(x_PGJBT.shape[0], -1, *x_PGJBT.shape[3:])
  return jnp.moveaxis(x_PABT, (2, 3), (0, 1))


def refine(
  index_BTPAM: jax.Array,
  chosen_BTPARM: jax.Array,
  core_CARR: jax.Array | None,
  m: int,
  choose: Choose = top_k.top_m,
) -> tuple[jax.Array, jax.Array]:
  """Scores the candidates exactly and keeps the best m of each head.

  Args:
    index_BTPAM, chosen_BTPARM: keys and scores of `filter_keys`.
    core_CARR: [C, A, R, R] float32; None: a cell's score is a sum of two.
    m: cells kept.
    choose: as for `filter_keys`.
  Returns:
    (index_BTPAM, side_BTPARM): row and column of the best m cells, best first,
    and their scores by side.
  """
  row_BTARM, column_BTARM = jnp.unstack(chosen_BTPARM, axis=2)
  num_candidates = chosen_BTPARM.shape[-1]
  if core_CARR is None:
    # Both sides are sorted, so cell (i, j) is no better than the i j cells
    # (i', j') with i' <= i and j' <= j: it can count only if i j <= m.
    grid_i, grid_j = np.indices((num_candidates, num_candidates)) + 1
    cells_m = np.flatnonzero(grid_i * grid_j <= m)
    row_m, column_m = np.divmod(cells_m, num_candidates)
    grid_BTAm = row_BTARM[..., 0, row_m] + column_BTARM[..., 0, column_m]
    cell_BTAM = jnp.asarray(cells_m, jnp.int32)[choose(grid_BTAm, m)]
  else:
    folded_BTARM = jnp.einsum(
      "BTARm,ARr->BTArm", row_BTARM, core_CARR.sum(0), precision=precision.EXACT
    )
    grid_BTAMM: Any = sum(
      folded_BTARM[..., r, :, None] * column_BTARM[..., r, None, :]
      for r in range(folded_BTARM.shape[-2])
    )
    cell_BTAM = choose(grid_BTAMM.reshape(*grid_BTAMM.shape[:3], -1), m)
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


def _take(x, index_BTAM):
  """Returns the elements [B, T, A, ..., M] at index of x's last axis."""
  extra = x.ndim - index_BTAM.ndim
  index = jnp.expand_dims(index_BTAM, range(3, 3 + extra))
  return jnp.take_along_axis(x, index, axis=-1)


def cell_scores(
  side_BTPARM: jax.Array, core_CARR: jax.Array | None
) -> jax.Array:
  """Returns each core's score of cells, [B, T, A, M, C], from those by side."""
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
