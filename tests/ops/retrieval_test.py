"""Retrieval: the fast form against the slow one, and both against numpy."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import chunks, retrieval, tucker
from ultramem_jax.ops.cpu import top_k
from ultramem_jax.testing import assert_close

# Every axis has another length, so that a transposed one shows.
B, T, N, K, M = 2, 5, 11, 7, 4


def random_inputs(heads=2, sharing=1, rank=2, per_rank=True, cores=2, seed=0):
  """query [B, T, P, G, R, K], keys [P, A, R, N, K], core (None: the sum)."""
  random = np.random.default_rng(seed)
  normal = lambda *shape: random.normal(size=shape).astype(np.float32)
  groups = heads // sharing
  rank = 1 if cores is None else rank
  query = normal(B, T, 2, groups, rank if per_rank else 1, K)
  keys = normal(2, heads, rank, N, K)
  core = None if cores is None else abs(normal(cores, heads, rank, rank))
  return query, keys, core


filter_vectors = jax.jit(tucker.filter_vectors)
retrieve = jax.jit(retrieval.retrieve, static_argnums=2)


def filter_of(core_CARR):
  return None if core_CARR is None else np.stack(filter_vectors(core_CARR))


@functools.partial(jax.jit, static_argnums=(0, 3))
def value_and_gradient(function, inputs, filter_PAR, m, cotangent_BTAMC):
  """(Retrieved, gradients of the scores times a cotangent)."""

  def loss(inputs):
    query, keys, core = inputs
    found = function(query, keys, m, core, filter_PAR)
    return (found.score_BTAMC * cotangent_BTAMC).sum(), found

  gradient, found = jax.grad(loss, has_aux=True)(inputs)
  return found, gradient


def assert_fast_is_reference(inputs, m=M, precision="float32"):
  """Same cells, scores and gradients.

  The reference gets one query per head and rank, so that few shapes of it are
  compiled; the gradients of shared queries are summed here.
  """
  query_BTPGRK, keys_PARNK, core = inputs
  heads, rank = keys_PARNK.shape[1:3]
  batch, length, _, groups, ranks, width = query_BTPGRK.shape
  sharing, repeats = heads // groups, rank // ranks
  filter_PAR = filter_of(core)
  cotangent_BTAMC = (
    np.random.default_rng(1)
    .normal(size=(batch, length, heads, m, 1 if core is None else len(core)))
    .astype(np.float32)
  )
  # A fresh function: jit must not reuse what other chunk sizes compiled.
  found, gradient = value_and_gradient(
    lambda *args: retrieval.retrieve(*args),
    inputs,
    filter_PAR,
    m,
    cotangent_BTAMC,
  )
  query_BTPARK = np.repeat(np.repeat(query_BTPGRK, sharing, 3), repeats, 4)
  inputs = jax.tree.map(
    lambda x: np.asarray(x, np.float32), (query_BTPARK, keys_PARNK, core)
  )
  expected, expected_gradient = value_and_gradient(
    retrieval.retrieve_reference, inputs, filter_PAR, m, cotangent_BTAMC
  )
  query_gradient = (
    np.asarray(expected_gradient[0])
    .reshape(batch, length, 2, groups, sharing, ranks, repeats, width)
    .sum((4, 6))
  )
  for name in ("row_BTAM", "column_BTAM"):
    index = getattr(found, name)
    assert index.dtype == jnp.int32
    np.testing.assert_array_equal(index, getattr(expected, name))
  assert found.score_BTAMC.dtype == jnp.float32
  assert_close(found.score_BTAMC, expected.score_BTAMC)
  assert_close(gradient, (query_gradient, *expected_gradient[1:]), precision)
  return found, gradient


CASES = [
  *(
    dict(sharing=sharing, rank=rank, per_rank=per_rank)
    for sharing, (rank, per_rank) in itertools.product(
      (1, 2), ((1, True), (2, True), (2, False), (3, True))
    )
  ),
  *(dict(sharing=sharing, cores=1) for sharing in (1, 2)),
  *(dict(sharing=sharing, cores=None) for sharing in (1, 2)),
  dict(heads=6, sharing=3, rank=4, per_rank=False, cores=3),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fast_is_reference(case, platform, monkeypatch):
  """Five positions in chunks of two, the last one padded."""
  chunks_asked = []
  monkeypatch.setattr(
    chunks, "chunk_length", lambda *args: chunks_asked.append(args) or 2
  )
  assert_fast_is_reference(random_inputs(**case))
  assert chunks_asked


@pytest.mark.parametrize("cores", [2, None])
def test_number_of_chunks_does_not_matter(cores, monkeypatch):
  """One position, or some, by one side and head at a time; all at once."""
  inputs = random_inputs(cores=cores)
  per_token = B * 4 * ((2 if cores else 1) * N + 2 * M * M)
  for budget in (0, per_token // 2, 2**30):
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", budget)
    assert_fast_is_reference(inputs)


@pytest.mark.parametrize("budget", [0, 2**30])
@pytest.mark.parametrize("cores", [2, None])
def test_scales_are_factors_of_keys(cores, budget, platform, monkeypatch):
  """Scores, choice and gradients are those of keys that were scaled before."""
  monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", budget)
  query, keys, core = random_inputs(sharing=2, cores=cores)
  random = np.random.default_rng(2)
  scale = random.uniform(0.5, 2, keys.shape[:-1]).astype(np.float32)
  cotangent_BTAMC = random.normal(size=(B, T, 2, M, cores or 1))
  filter_PAR = filter_of(core)

  def scaled(query, keys, core, scale):
    return retrieval.retrieve(query, keys, M, core, filter_PAR, scale)

  def scaled_before(query, keys, core, scale):
    return retrieval.retrieve(
      query, keys * scale[..., None], M, core, filter_PAR
    )

  def value_and_gradient(function):
    def loss(inputs):
      found = function(*inputs)
      return (found.score_BTAMC * cotangent_BTAMC).sum(), found

    return jax.jit(jax.grad(loss, has_aux=True))(inputs)

  inputs = query, keys, core, scale
  gradient, found = value_and_gradient(scaled)
  expected_gradient, expected = value_and_gradient(scaled_before)
  for index, expected_index in zip(found[:2], expected[:2], strict=True):
    np.testing.assert_array_equal(index, expected_index)
  assert_close(found.score_BTAMC, expected.score_BTAMC)
  assert_close(gradient, expected_gradient)
  unscaled = jax.jit(retrieval.retrieve, static_argnums=2)(
    query, keys, M, core, filter_PAR
  )
  assert (unscaled.row_BTAM != found.row_BTAM).any()


@pytest.mark.parametrize("m", [1, N])
def test_extremes_of_m_and_a_single_position(m):
  query, *rest = random_inputs()
  assert_fast_is_reference((query[:1, :1], *rest), m)


def side_scores(query_BTPGRK, keys_PARNK):
  """[B, T, P, A, R, N] float64, head a reading query a // sharing."""
  _, heads, rank = keys_PARNK.shape[:3]
  sharing = heads // query_BTPGRK.shape[3]
  score = np.empty((B, T, 2, heads, rank, N))
  for a, r in np.ndindex(heads, rank):
    query_BTPK = query_BTPGRK[:, :, :, a // sharing, r % query_BTPGRK.shape[4]]
    score[:, :, :, a, r] = np.einsum(
      "BTPK,PNK->BTPN",
      query_BTPK.astype(np.float64),
      keys_PARNK[:, a, r].astype(np.float64),
    )
  return score


@pytest.mark.parametrize("sharing", [1, 2])
def test_product_keys_find_the_top_of_the_whole_grid(sharing):
  query, keys, _ = random_inputs(sharing=sharing, cores=None)
  found = jax.device_get(retrieve(query, keys, M))
  side_BTPARN = side_scores(query, keys)
  for b, t, a in np.ndindex(B, T, 2):
    row_N, column_N = side_BTPARN[b, t, :, a, 0]
    grid_NN = row_N[:, None] + column_N
    best_M = np.argsort(-grid_NN, axis=None)[:M]
    cell_M = found.row_BTAM[b, t, a] * N + found.column_BTAM[b, t, a]
    np.testing.assert_array_equal(cell_M, best_M)
    assert_close(found.score_BTAMC[b, t, a, :, 0], grid_NN.flat[best_M])


@pytest.mark.parametrize("function", ["retrieve", "retrieve_reference"])
def test_two_stage_definition(function):
  """Filter by u and t, then score the m x m candidates exactly."""
  query, keys, core_CARR = random_inputs(heads=4, sharing=2, per_rank=False)
  filter_PAR = filter_of(core_CARR)
  function = jax.jit(getattr(retrieval, function), static_argnums=2)
  found = jax.device_get(function(query, keys, M, core_CARR, filter_PAR))
  side_BTPARN = side_scores(query, keys)
  recalled = []
  for b, t, a in np.ndindex(B, T, 4):
    row_RN, column_RN = side_BTPARN[b, t, :, a]
    grid_CNN = np.einsum("Rm,CRr,rn->Cmn", row_RN, core_CARR[:, a], column_RN)
    rows_M = np.argsort(-(filter_PAR[0, a] @ row_RN))[:M]
    columns_M = np.argsort(-(filter_PAR[1, a] @ column_RN))[:M]
    total_MM = grid_CNN.sum(0)[np.ix_(rows_M, columns_M)]
    row_M, column_M = np.divmod(np.argsort(-total_MM, axis=None)[:M], M)
    row_M, column_M = rows_M[row_M], columns_M[column_M]
    np.testing.assert_array_equal(found.row_BTAM[b, t, a], row_M)
    np.testing.assert_array_equal(found.column_BTAM[b, t, a], column_M)
    assert_close(found.score_BTAMC[b, t, a], grid_CNN[:, row_M, column_M].T)
    exact_M = np.argsort(-grid_CNN.sum(0), axis=None)[:M]
    recalled.append(np.isin(exact_M, row_M * N + column_M).mean())
  # The layer is defined by the filter: the exact top m is not its aim.
  assert 0.2 < np.mean(recalled) < 0.8


def test_flipping_the_filter_retrieves_other_cells():
  query, keys, core_CARR = random_inputs()
  cells = []
  for sign in (1, -1):
    found = jax.device_get(
      retrieve(query, keys, M, core_CARR, sign * filter_of(core_CARR))
    )
    cells.append(found.row_BTAM * N + found.column_BTAM)
  assert not (cells[0][..., None] == cells[1][..., None, :]).any()


@pytest.mark.parametrize("cores", [2, None])
def test_ties_go_to_the_lowest_index(cores):
  query, keys, core = random_inputs(cores=cores, heads=1)
  # A query of zeros, as of padding: everything ties.
  found = jax.device_get(retrieve(0 * query, keys, M, core, filter_of(core)))
  assert not found.row_BTAM.any()
  assert (found.column_BTAM == np.arange(M)).all()
  assert not found.score_BTAMC.any()
  # Rows 8, 9, 10 repeat rows 0, 1, 2: none may come before its original.
  keys[0, :, :, 8:] = keys[0, :, :, :3]
  found = jax.device_get(retrieve(query, keys, M, core, filter_of(core)))
  row_BTM, column_BTM = found.row_BTAM[:, :, 0], found.column_BTAM[:, :, 0]
  repeats = 0
  for b, t, i in np.argwhere(row_BTM >= 8):
    original = (row_BTM[b, t, :i] == row_BTM[b, t, i] - 8) & (
      column_BTM[b, t, :i] == column_BTM[b, t, i]
    )
    assert original.sum() == 1
    repeats += 1
  assert repeats > 0


@pytest.mark.parametrize("cores", [2, None])
def test_bfloat16(cores):
  """Scores of rounded inputs are exact; gradients are rounded themselves."""
  query, keys, core = random_inputs(cores=cores)
  half = (jnp.bfloat16(query), jnp.bfloat16(keys), core)
  _, gradient = assert_fast_is_reference(half, precision="bfloat16")
  assert gradient[0].dtype == gradient[1].dtype == jnp.bfloat16


def test_the_choice_and_the_filter_have_no_gradient():
  query, keys, core = random_inputs()

  def total(filter_PAR):
    return retrieval.retrieve(query, keys, M, core, filter_PAR)[2].sum()

  assert not jax.jit(jax.grad(total))(filter_of(core)).any()


def test_keys_never_chosen_have_no_gradient():
  inputs = random_inputs(sharing=2)
  found, (_, gradient_PARNK, _) = assert_fast_is_reference(inputs)
  for side, index_BTAM in enumerate(found[:2]):
    for a in range(2):
      chosen = np.unique(index_BTAM[:, :, a])
      moved = np.flatnonzero(gradient_PARNK[side, a].any(axis=(0, 2)))
      np.testing.assert_array_equal(moved, chosen)


@pytest.mark.parametrize("cores", [2, None])
def test_no_full_sort(cores, monkeypatch):
  """XLA's top-k must not fall back to sorting all keys or all candidates."""
  inputs = random_inputs(cores=cores)
  for budget in (0, 2**30):
    monkeypatch.setattr(chunks, "CPU_CHUNK_BYTES", budget)
    compiled = (
      jax.jit(lambda *x: retrieval.retrieve(x[0], x[1], M, x[2], x[3]))
      .lower(*inputs, filter_of(inputs[2]))
      .compile()
      .as_text()
    )
    assert " sort(" not in compiled
    assert "TopK" in compiled


def test_a_slice_of_top_m_is_no_sort():
  """XLA merges a slice into a top-k, which then becomes a sort."""
  compiled = (
    jax.jit(lambda x: top_k.top_m(x, 8)[:3])
    .lower(jnp.zeros((4, 64)))
    .compile()
    .as_text()
  )
  assert " sort(" not in compiled
