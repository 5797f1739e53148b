"""The Tucker core's filter vectors and auxiliary loss, against numpy."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import tucker
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import hlo

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


filter_vectors = jax.jit(tucker.filter_vectors)
refresh_filter = jax.jit(tucker.refresh_filter)
singular_values = jax.jit(tucker.singular_values)


def random_cores(rank, cores=2, heads=3, seed=0):
  """[C, A, R, R], uniform on [0, 1) as at initialization, plus some noise."""
  random = np.random.default_rng(seed)
  core = random.uniform(size=(cores, heads, rank, rank))
  return (core + 0.3 * random.normal(size=core.shape)).astype(np.float32)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_filter_vectors_are_leading_singular_vectors(rank):
  core_CARR = random_cores(rank)
  u_AR, t_AR = filter_vectors(core_CARR)
  assert u_AR.dtype == t_AR.dtype == jnp.float32
  core_ARR = core_CARR.astype(np.float64).sum(0)
  left, value, right = np.linalg.svd(core_ARR)
  outer = np.einsum("AR,Ar->ARr", u_AR, t_AR)
  # The outer product does not depend on the joint sign.
  assert_close(outer, np.einsum("AR,Ar->ARr", left[:, :, 0], right[:, 0]))
  assert_close(np.linalg.norm(u_AR, axis=-1), np.ones(3))
  assert_close(np.einsum("AR,ARr,Ar->A", u_AR, core_ARR, t_AR), value[:, 0])
  assert (u_AR.sum(-1) >= 0).all()


# Of rank 2: the closed form's angles are undefined where a part vanishes.
SPECIAL_CORES = [
  [[0, 0], [0, 0]],
  [[0, -3], [3, 0]],  # a turn: equal values
  [[0, 3], [3, 0]],  # a flip
  [[1, 0], [0, 1]],
  [[1, 1e-4], [0, 1]],
  [[2, 4], [1, 2]],  # rank 1
  [[0, 0], [-5, 0]],
  [[-0.0, -0.0], [-0.0, -2]],
  [[1e12, 2e12], [3e12, -1e12]],
  [[1e-12, 2e-12], [3e-12, -1e-12]],
]


def test_special_cores_of_rank_2():
  """Unit vectors that reach the largest value; finite gradients."""
  core_CARR = np.array(SPECIAL_CORES, np.float32)[None]
  core_ARR = core_CARR[0].astype(np.float64)
  value_AR = np.linalg.svd(core_ARR, compute_uv=False)
  u_AR, t_AR = map(np.asarray, filter_vectors(core_CARR))
  ones_A = np.ones(len(core_ARR))
  assert_close(np.linalg.norm(u_AR, axis=-1), ones_A)
  assert_close(np.linalg.norm(t_AR, axis=-1), ones_A)
  # The joint sign, but for a sum of 0 and its rounding.
  assert u_AR.sum(-1).min() > -1e-6
  singular_AR, gradient_of = jax.vjp(singular_values, core_CARR)
  reached_A = np.einsum("AR,ARr,Ar->A", u_AR, core_ARR, t_AR)
  for head, value_R in enumerate(value_AR):
    assert_close(singular_AR[head], value_R)
    assert_close(reached_A[head], value_R[0])
  assert np.isfinite(gradient_of(jnp.ones_like(singular_AR))[0]).all()
  loss = jax.jit(jax.grad(tucker.auxiliary_loss))
  assert np.isfinite(loss(core_CARR, 1.0, 0.0)).all()


def test_gradient_at_equal_values_is_that_of_their_sum():
  """Each alone has a kink there; the sum of a turn's is smooth."""
  core_CARR = np.array([[[[0, -3], [3, 0]]]], np.float32)
  gradient = jax.jit(jax.grad(lambda x: tucker.singular_values(x).sum()))
  assert_close(gradient(core_CARR), core_CARR / 3)


@pytest.mark.parametrize("seed", [0, 1])
def test_rank_2_is_as_exact_as_numpy(seed):
  """Many heads at once: float32's rounding, 6e-8 of the largest value."""
  random = np.random.default_rng(seed)
  core_CARR = random.normal(size=(2, 2000, 2, 2)).astype(np.float32)
  core_ARR = core_CARR.sum(0).astype(np.float64)
  left, value_AR, right = np.linalg.svd(core_ARR)
  scale_A1 = value_AR[:, :1]
  error_AR = (singular_values(core_CARR) - value_AR) / scale_A1
  assert abs(error_AR).max() < 3e-7
  u_AR, t_AR = filter_vectors(core_CARR)
  # A vector turns by an error of the core over the gap of its values.
  gap_A1 = 1 - value_AR[:, 1:] / scale_A1
  for vector_AR, expected_AR in [(u_AR, left[:, :, 0]), (t_AR, right[:, 0])]:
    sign_A1 = np.sign((vector_AR * expected_AR).sum(-1, keepdims=True))
    error_AR = (sign_A1 * vector_AR - expected_AR) * gap_A1
    assert abs(error_AR).max() < 5e-7


def test_rank_2_calls_no_library_and_has_no_loop():
  """An SVD is a call to LAPACK on a CPU, a loop on a TPU."""

  def step(core_CARR, u_AR, t_AR):
    loss, gradient = jax.value_and_grad(tucker.auxiliary_loss)(
      core_CARR, 1.0, 0.15
    )
    return loss, gradient, tucker.refresh_filter(core_CARR, u_AR, t_AR)

  def opcodes(rank):
    zeros_AR = jnp.zeros((3, rank))
    compiled = jax.jit(step).lower(random_cores(rank), zeros_AR, zeros_AR)
    program = hlo.Program(compiled.compile().as_text())
    return {x.opcode for xs in program.computations.values() for x in xs}

  assert not {"custom-call", "while"} & opcodes(2)
  assert "custom-call" in opcodes(3)


def test_canonical_sign_of_negated_cores():
  """-C has the same u and the opposite t: u alone fixes the sign."""
  core_CARR = random_cores(3)
  u_AR, t_AR = filter_vectors(core_CARR)
  minus_u_AR, minus_t_AR = filter_vectors(-core_CARR)
  assert_close(minus_u_AR, u_AR)
  assert_close(minus_t_AR, -t_AR)


def test_no_gradient_through_the_vectors():
  def total(core_CARR):
    u_AR, t_AR = tucker.filter_vectors(core_CARR)
    refreshed = tucker.refresh_filter(core_CARR, u_AR, t_AR)
    return u_AR.sum() + t_AR.sum() + sum(x.sum() for x in refreshed)

  assert not jax.jit(jax.grad(total))(random_cores(2)).any()


@pytest.mark.parametrize("sign", [1, -1])
def test_refresh_keeps_the_sign_through_a_random_walk(sign):
  """u turns past the plane sum(u) = 0, where the canonical sign flips.

  Rank 2, u at an angle that drifts around the whole circle: consecutive
  vectors must stay close although the canonical ones jump.
  """
  random = np.random.default_rng(0)
  previous, jumps = None, 0
  for step in range(120):
    angle = step * 2 * np.pi / 60
    u_R = np.array([np.cos(angle), np.sin(angle)])
    core_CARR = np.outer(u_R, [0.8, 0.6]) + 0.02 * random.normal(size=(2, 2))
    core_CARR = core_CARR.astype(np.float32)[None, None]
    canonical = filter_vectors(core_CARR)
    if previous is None:
      previous = tuple(sign * x for x in canonical)
    current = refresh_filter(core_CARR, *previous)
    for new, old in zip(current, previous, strict=True):
      assert abs(new - old).max() < 0.3  # a step turns by 0.1, noise by 0.05
    jumps += int((current[0] * canonical[0]).sum() < 0)
    previous = current
  assert 30 < jumps < 90  # the test did cross: half of the circle is flipped


def test_refresh_chooses_the_sign_of_each_head_jointly():
  core_CARR = random_cores(2, heads=4)
  u_AR, t_AR = filter_vectors(core_CARR)
  sign_A1 = np.array([[1], [-1], [1], [-1]], np.float32)
  # L1 over u and t together: t's agreement may outvote u's disagreement.
  new_u_AR, new_t_AR = refresh_filter(
    core_CARR, -0.1 * sign_A1 * u_AR, sign_A1 * t_AR
  )
  assert_close(new_u_AR, sign_A1 * u_AR)
  assert_close(new_t_AR, sign_A1 * t_AR)


def test_refresh_measures_l1():
  """By hand: u = t = (0.8, 0.6); L1 and L2 choose opposite signs."""
  core_CARR = np.outer([0.8, 0.6], [0.8, 0.6]).astype(np.float32)[None, None]
  previous_u_AR = np.array([[1.0, 0.0]], np.float32)
  previous_t_AR = np.array([[-0.4, -0.5]], np.float32)
  # L1 to +: 0.2 + 0.6 + 1.2 + 1.1 = 3.1; to -: 1.8 + 0.6 + 0.4 + 0.1 = 2.9.
  # L2 squared to +: 3.05; to -: 3.77.
  u_AR, t_AR = refresh_filter(core_CARR, previous_u_AR, previous_t_AR)
  assert_close(u_AR, [[-0.8, -0.6]])
  assert_close(t_AR, [[-0.8, -0.6]])


def test_a_tie_keeps_the_canonical_sign():
  core_CARR = random_cores(3)
  zeros_AR = np.zeros((3, 3), np.float32)
  refreshed = refresh_filter(core_CARR, zeros_AR, zeros_AR)
  assert_close(refreshed, filter_vectors(core_CARR))


def numpy_auxiliary_loss(core_CARR, weight, margin):
  value_AR = np.linalg.svd(core_CARR.astype(np.float64).sum(0))[1]
  heads, rank = value_AR.shape
  excess = [
    max(0.0, value_AR[a, i] - margin) ** 2
    for a in range(heads)
    for i in range(1, rank)
  ]
  return weight * sum(excess) / max(1, rank - 1) / heads


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_auxiliary_loss_is_its_formula(rank):
  core_CARR = random_cores(rank, seed=1)
  auxiliary = jax.jit(jax.value_and_grad(tucker.auxiliary_loss))
  loss, gradient = auxiliary(core_CARR, 0.5, 0.15)
  expected = numpy_auxiliary_loss(core_CARR, 0.5, 0.15)
  assert loss.dtype == jnp.float32
  assert_close(loss, np.float64(expected))
  if rank == 1:
    assert not gradient.any()
    return
  assert expected > 0
  # A margin above every singular value: no loss, no gradient.
  above = auxiliary(core_CARR, 0.5, 20.0)
  assert not any(np.any(x) for x in above)
  # Central differences in numpy's float64, along a random direction.
  direction = random_cores(rank, seed=2).astype(np.float64)
  rise = [
    numpy_auxiliary_loss(core_CARR + eps * direction, 0.5, 0.15)
    for eps in (1e-5, -1e-5)
  ]
  slope = (rise[0] - rise[1]) / 2e-5
  assert_close((gradient * direction).sum(), slope)


def test_singular_values_are_sorted():
  core_CARR = random_cores(4)
  expected = np.linalg.svd(core_CARR.astype(np.float64).sum(0))[1]
  assert_close(singular_values(core_CARR), expected)


@pytest.mark.parametrize("name", ["v1_a", "v1_b"])
def test_against_the_authors_code(name):
  with np.load(GOLDENS / f"{name}.npz") as golden:
    core_CARR, gradient_CARR = (
      np.stack([golden[f"{prefix}/tucker_core.{i}"] for i in (0, 1)])
      for prefix in ("param", "tucker_aux_grad")
    )
    # alpha is left out of their number.
    loss, gradient = jax.jit(jax.value_and_grad(tucker.auxiliary_loss))(
      core_CARR, 1.0, 0.15
    )
    # The distance to the margin, 0.04 of values of about 2, loses digits.
    np.testing.assert_allclose(loss, golden["tucker_aux_loss"], atol=1e-7)
    np.testing.assert_allclose(gradient, gradient_CARR, atol=1e-6)
    assert_close(
      singular_values(core_CARR), golden["tucker_core_singular_values"]
    )
    u_AR, t_AR = filter_vectors(core_CARR)
    their_u_AR = golden["buffer/tucker_core_u"][0, :, 0]
    their_t_AR = golden["buffer/tucker_core_v"][0, :, 0]
    sign_A1 = np.sign((u_AR * their_u_AR).sum(-1, keepdims=True))
    assert_close(sign_A1 * u_AR, their_u_AR)
    assert_close(sign_A1 * t_AR, their_t_AR)
