"""The two stages that choose cells, against their definitions in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import candidates
from ultramem_jax.testing import assert_close

B, T, G, J, R, N, K, M = 2, 3, 2, 2, 2, 12, 4, 5
A = G * J


@pytest.mark.parametrize("in_turn", [False, True])
def test_the_filter_keeps_the_keys_of_the_highest_weighted_scores(in_turn):
  rng = np.random.default_rng(0)
  query_BTPGRK = rng.normal(size=(B, T, 2, G, R, K)).astype(np.float32)
  keys_PGJRNK = rng.normal(size=(2, G, J, R, N, K)).astype(np.float32)
  scale_PGJRN = rng.uniform(0.5, 2, (2, G, J, R, N)).astype(np.float32)
  filter_PGJR = rng.normal(size=(2, G, J, R)).astype(np.float32)
  index_BTPAM, chosen_BTPARM = jax.jit(
    candidates.filter_keys, static_argnums=(4, 5)
  )(query_BTPGRK, keys_PGJRNK, scale_PGJRN, filter_PGJR, M, in_turn)
  score_BTPGJRN = scale_PGJRN * np.einsum(
    "BTPGRK,PGJRNK->BTPGJRN", query_BTPGRK, keys_PGJRNK
  )
  score_BTPARN = score_BTPGJRN.reshape(B, T, 2, A, R, N)
  filtered_BTPAN = np.einsum(
    "BTPARN,PAR->BTPAN", score_BTPARN, filter_PGJR.reshape(2, A, R)
  )
  expected_BTPAM = np.argsort(-filtered_BTPAN, axis=-1)[..., :M]
  np.testing.assert_array_equal(index_BTPAM, expected_BTPAM)
  assert_close(
    chosen_BTPARM,
    np.take_along_axis(score_BTPARN, expected_BTPAM[:, :, :, :, None], -1),
  )


@pytest.mark.parametrize("score", ["tucker", "sum"])
def test_refining_keeps_the_best_cells_of_the_candidates(score):
  rng = np.random.default_rng(0)
  rank = R if score == "tucker" else 1
  # Best first, as the filter returns them.
  chosen_BTPARM = -np.sort(-rng.normal(size=(B, T, 2, A, rank, M)), axis=-1)
  chosen_BTPARM = chosen_BTPARM.astype(np.float32)
  index_BTPAM = rng.integers(0, N, (B, T, 2, A, M)).astype(np.int32)
  core_CARR = rng.normal(size=(2, A, R, R)).astype(np.float32)
  row_BTARM, column_BTARm = chosen_BTPARM[:, :, 0], chosen_BTPARM[:, :, 1]
  if score == "tucker":
    grid_BTAMm = np.einsum(
      "BTARM,CARr,BTArm->BTAMm", row_BTARM, core_CARR, column_BTARm
    )
  else:
    core_CARR = None
    grid_BTAMm = row_BTARM[..., 0, :, None] + column_BTARm[..., 0, None, :]
  flat = grid_BTAMm.reshape(B, T, A, -1)
  place_BTPAM = np.stack(
    np.divmod(np.argsort(-flat, axis=-1)[..., :M], M), axis=2
  )
  index, side = jax.jit(candidates.refine, static_argnums=3)(
    index_BTPAM, chosen_BTPARM, core_CARR, M
  )
  np.testing.assert_array_equal(
    index, np.take_along_axis(index_BTPAM, place_BTPAM, -1)
  )
  assert_close(
    side, np.take_along_axis(chosen_BTPARM, place_BTPAM[:, :, :, :, None], -1)
  )
  # The score of a cell from those of its sides is that of the grid.
  scores_BTAMC = candidates.cell_scores(
    jnp.asarray(side), None if core_CARR is None else jnp.asarray(core_CARR)
  )
  assert_close(scores_BTAMC.sum(-1), -np.sort(-flat, axis=-1)[..., :M])
