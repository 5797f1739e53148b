"""The fixed shuffle of implicit value expansion (paper section 3.4).

A cell of the s x s grid (s = sqrt(E) * n) maps one-to-one to a slot in
[0, s * s), the number of a virtual row: its physical row is slot mod n^2, its
pool is slot div n^2.
"""

import jax
import jax.numpy as jnp

# With one or two rounds, how far neighbours scatter depends strongly on the key
# (tests/ops/shuffle_test.py measures it).
NUM_ROUNDS = 4


def mix(x: jax.Array | int) -> jax.Array:
  """Hashes 32-bit integers one-to-one, elementwise; returns uint32.

  The finalizer of MurmurHash3 (A. Appleby, public domain).
  """
  bits = jnp.asarray(x, jnp.uint32)
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
  bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
  return bits ^ (bits >> 16)


def hash_shuffle(
  row: jax.Array, column: jax.Array, side: int, seed: int
) -> jax.Array:
  """Maps grid cells one-to-one to scattered slots, without a stored table.

  Feistel rounds over Z_s x Z_s: (a, b) -> (b, a + F(b) mod s), where F is
  `mix` keyed by seed and round. Each round is invertible whatever F is, so
  the whole is a bijection for any s.

  Args:
    row, column: int32 arrays of equal shape, in [0, s).
    side: s = sqrt(E) * n, at most 46340 so that s * s fits in int32.
    seed: constant of the layer, any int in [0, 2^32).
  Returns:
    int32, of the same shape, in [0, s * s).
  """
  left = jnp.asarray(row, jnp.uint32)
  right = jnp.asarray(column, jnp.uint32)
  modulus = jnp.uint32(side)
  for round_index in range(NUM_ROUNDS):
    # Hashed twice: consecutive seeds must not share round keys.
    round_key = mix(mix(seed) + jnp.uint32(round_index + 1))
    # Reduce before adding: the sum of two numbers below s cannot wrap around
    # 2^32, which would break the bijection.
    shift = mix(right ^ round_key) % modulus
    left, right = right, (left + shift) % modulus
  return (left * modulus + right).astype(jnp.int32)


def random_permutation(key: jax.Array, side: int) -> jax.Array:
  """Returns a shuffle to store: the slot of each cell row * s + column.

  Args:
    key: PRNG key.
    side: s = sqrt(E) * n.
  Returns:
    int32 [s * s], a permutation.
  """
  return jax.random.permutation(key, side * side).astype(jnp.int32)
