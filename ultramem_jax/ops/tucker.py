"""The Tucker core: its rank-1 filter and its auxiliary loss (section 3.3).

The score of grid cell (a, b) is S_row[:, a]^T C S_col[:, b]. Retrieval first
filters rows and columns by the leading singular vectors of C.
"""

import jax
import jax.numpy as jnp


def filter_vectors(core_CARR: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Returns leading singular vectors of the summed cores, in a canonical sign.

  Args:
    core_CARR: [C, A, R, R] float, the cores of multi-core scoring.
  Returns:
    (u_AR, t_AR), [A, R] float32 unit vectors: sum_c core ~ lambda_1 u t^T per
    head; u filters rows and t columns. u sums to at least 0, because the sign
    that an SVD returns depends on the backend. No gradient.
  """
  core_ARR = jax.lax.stop_gradient(core_CARR.sum(0).astype(jnp.float32))
  if core_ARR.shape[-1] == 2:
    u_AR, t_AR = _leading_vectors_2x2(core_ARR)
  else:
    left_ARR, _, right_ARR = jnp.linalg.svd(core_ARR)
    u_AR, t_AR = left_ARR[:, :, 0], right_ARR[:, 0, :]
  sign_A1 = jnp.where(u_AR.sum(-1, keepdims=True) < 0, -1.0, 1.0)
  return sign_A1 * u_AR, sign_A1 * t_AR


@jax.jit
def refresh_filter(
  core_CARR: jax.Array, previous_u_AR: jax.Array, previous_t_AR: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Returns filter vectors whose sign, for each head, fits the previous ones.

  (u, t) and (-u, -t) are equally good factors of the core, but retrieve almost
  disjoint rows. This takes the pair that is closer in L1 to the previous one,
  and the canonical pair if both are equally close.

  Args:
    core_CARR: [C, A, R, R] float.
    previous_u_AR, previous_t_AR: [A, R] float32, from the step before.
  Returns:
    (u_AR, t_AR), [A, R] float32.
  """
  u_AR, t_AR = filter_vectors(core_CARR)

  def distance_A1(sign):
    distance_AR = abs(sign * u_AR - previous_u_AR) + abs(
      sign * t_AR - previous_t_AR
    )
    return distance_AR.sum(-1, keepdims=True)

  sign_A1 = jnp.where(distance_A1(-1) < distance_A1(1), -1.0, 1.0)
  return sign_A1 * u_AR, sign_A1 * t_AR


def singular_values(core_CARR: jax.Array) -> jax.Array:
  """Returns the summed cores' singular values [A, R] float32, largest first."""
  core_ARR = core_CARR.sum(0).astype(jnp.float32)
  if core_ARR.shape[-1] == 2:
    return _singular_values_2x2(core_ARR)
  return jnp.linalg.svd(core_ARR, compute_uv=False)


# Rank 2 in closed form, as an SVD is a loop of rotations or a call to LAPACK.
# A 2x2 matrix is a scaled rotation by an angle a plus a scaled reflection. It
# maps the unit vector at angle x to
#
#     turn * (cos, sin)(a + x) + flip * (cos, sin)(b - x).
#
# The sum is longest where both terms have one direction, a + x = b - x: there x
# is the angle of t, and (a + b) / 2 the angle of u.


def _turn_and_flip(core_ARR):
  """Returns turn * (cos a, sin a) and flip * (cos b, sin b), each of [A]."""
  (c00_A, c01_A), (c10_A, c11_A) = core_ARR.transpose(1, 2, 0)
  turn = (c00_A + c11_A) / 2, (c10_A - c01_A) / 2
  flip = (c00_A - c11_A) / 2, (c10_A + c01_A) / 2
  return turn, flip


def _leading_vectors_2x2(core_ARR):
  """Returns (u_AR, t_AR) up to their joint sign; at a tie, any best pair."""
  turn, flip = _turn_and_flip(core_ARR)
  a_A, b_A = jnp.arctan2(*turn[::-1]), jnp.arctan2(*flip[::-1])
  return tuple(
    jnp.stack([jnp.cos(angle_A), jnp.sin(angle_A)], axis=-1)
    for angle_A in ((b_A + a_A) / 2, (b_A - a_A) / 2)
  )


def _singular_values_2x2(core_ARR):
  turn_A, flip_A = (_length(*vector) for vector in _turn_and_flip(core_ARR))
  return jnp.stack([turn_A + flip_A, abs(turn_A - flip_A)], axis=-1)


def _length(x, y):
  """Returns sqrt(x^2 + y^2), with gradient 0 at 0 (else it would be NaN)."""
  square = x * x + y * y
  is_zero = square == 0
  return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, square)))


def auxiliary_loss(
  core_CARR: jax.Array, weight: float, margin: float
) -> jax.Array:
  """Returns the loss that keeps cores near rank 1, where the filter is exact.

    weight / (R - 1) * sum_{i >= 2} max(0, lambda_i - margin)^2

  Averaged over heads (paper section 3.3, its alpha and tau); 0 if R = 1.

  Args:
    core_CARR: [C, A, R, R] float.
    weight, margin: alpha and tau, at least 0.
  Returns:
    float32 scalar.
  """
  rank = core_CARR.shape[-1]
  if rank == 1:
    return jnp.float32(0)
  excess_AR = jax.nn.relu(singular_values(core_CARR)[:, 1:] - margin)
  return weight * jnp.square(excess_AR).mean(0).sum() / (rank - 1)
