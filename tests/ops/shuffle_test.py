"""The shuffle of implicit value expansion: a bijection that scatters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax.ops import shuffle
from ultramem_jax.settings.memory import MAX_GRID_SIDE

MASK = 2**32 - 1


def reference_mix(x):
  """MurmurHash3's finalizer in exact integers: Python's, or uint64 arrays."""
  x = ((x ^ (x >> 16)) * 0x85EBCA6B) & MASK
  x = ((x ^ (x >> 13)) * 0xC2B2AE35) & MASK
  return x ^ (x >> 16)


def reference_shuffle(row, column, side, seed):
  """`hash_shuffle` in integers that cannot wrap around.

  Returns the index, and whether adding a hash that was not reduced modulo the
  side would have wrapped around 2^32.
  """
  wraps = False
  for round_index in range(4):
    key = reference_mix((reference_mix(seed) + round_index + 1) & MASK)
    shift = reference_mix(column ^ key)
    wraps = wraps | (row + shift > MASK)
    row, column = column, (row + shift % side) % side
  return row * side + column, wraps


def shuffled_grid(side, seed):
  """[s, s] array of the shuffled indices of all cells."""
  row, column = np.divmod(np.arange(side * side, dtype=np.int32), side)
  index = shuffle.hash_shuffle(row, column, side, seed)
  assert index.dtype == jnp.int32
  return np.asarray(index).reshape(side, side)


def is_bijection(index, side):
  return (np.bincount(index.ravel(), minlength=side * side) == 1).all()


def test_mix_is_murmur3():
  # Published values of fmix32 at 1, and the fixed point 0.
  assert int(shuffle.mix(0)) == 0
  assert int(shuffle.mix(1)) == 0x514E28B7
  x = np.random.default_rng(0).integers(2**32, size=1000, dtype=np.uint64)
  actual = shuffle.mix(x.astype(np.uint32))
  np.testing.assert_array_equal(actual, reference_mix(x))


def test_bijection_on_every_small_grid():
  largest, seeds = 64, jnp.array([0, 1, 2, 2**32 - 1], jnp.uint32)
  row, column = np.divmod(np.arange(largest**2, dtype=np.int32), largest)
  over_seeds = jax.vmap(shuffle.hash_shuffle, (None, None, None, 0))
  index = np.asarray(
    jax.jit(jax.vmap(over_seeds, (None, None, 0, None)))(
      row, column, jnp.arange(1, largest + 1), seeds
    )
  )
  for side in range(1, largest + 1):
    inside = (row < side) & (column < side)
    for of_seed in index[side - 1][:, inside]:
      assert is_bijection(of_seed, side), side


@pytest.mark.parametrize("side", [255, 1000, 2200])
def test_bijection_on_large_grids(side):
  for seed in (0, 5):
    assert is_bijection(shuffled_grid(side, seed), side)


@pytest.mark.parametrize("side", [2200, 3578, MAX_GRID_SIDE])
def test_no_wrap_around_at_any_size(side):
  """Equal to exact integers, also where an unreduced hash would wrap."""
  random = np.random.default_rng(side)
  column = random.integers(side, size=4_000_000, dtype=np.uint64)
  seed = random.integers(2**32, size=column.size, dtype=np.uint64)
  row = np.full_like(column, side - 1)
  expected, wraps = reference_shuffle(row, column, side, seed)
  assert wraps.sum() > 1  # about 4e6 * 2.5 s / 2^32
  actual = np.asarray(
    shuffle.hash_shuffle(
      row.astype(np.int32),
      column.astype(np.int32),
      side,
      seed.astype(np.uint32),
    )
  )
  np.testing.assert_array_equal(actual, expected)
  first = reference_shuffle(side - 1, int(column[0]), side, int(seed[0]))[0]
  assert actual[0] == first


def test_layers_differ():
  side = 100
  grids = np.stack([shuffled_grid(side, seed) for seed in range(6)])
  for layer, grid in enumerate(grids):
    agree = (grids[layer + 1 :] == grid).sum(axis=(1, 2))
    # Two random permutations agree in one cell on average (Poisson).
    assert (agree < 10).all()
  # Nor is a layer another one mirrored.
  assert (grids[0] == grids[1].T).sum() < 10


PARTS = 16  # of the index: with E = 4, a block and a quarter of its rows


def scatter(side, seed):
  """How evenly lines of cells, and neighbours on them, fall into PARTS.

  Returns, for rows and then columns of the grid: chi-square per degree of
  freedom of a line's cells over the parts, averaged over the lines; and how
  much more often than by chance two neighbours share a part. A random
  permutation gives about 1 for all four.
  """
  part = shuffled_grid(side, seed).astype(np.int64) * PARTS // side**2
  expected = side / PARTS
  result = []
  for lines in (part, part.T):
    count = np.stack([(lines == p).sum(1) for p in range(PARTS)])
    result.append(
      np.square(count - expected).sum()
      / expected
      / count.size
      * PARTS
      / (PARTS - 1)
    )
    result.append((lines[:, 1:] == lines[:, :-1]).mean() * PARTS)
  return np.array(result)


def test_scatters_neighbours():
  side = 208
  result = np.stack([scatter(side, seed) for seed in range(6)])
  # 208 lines of 15 degrees of freedom: std 0.025 if they were independent.
  np.testing.assert_allclose(result[:, [0, 2]], 1, atol=0.1)
  # 43,056 pairs: std 0.02 if independent; those of a column share shifts.
  np.testing.assert_allclose(result[:, 1], 1, atol=0.1)
  np.testing.assert_allclose(result[:, 3], 1, atol=0.25)


def test_fewer_rounds_scatter_worse(monkeypatch):
  """Why four: two leave columns together, three depend on the key."""
  side, seeds = 208, range(6)
  result = {}
  for rounds in (1, 2, 3, 4):
    monkeypatch.setattr(shuffle, "NUM_ROUNDS", rounds)
    result[rounds] = np.stack([scatter(side, seed) for seed in seeds])
  # One and two rounds: neighbours of a column stay in one part of sixteen.
  assert (result[1][:, 3] > 10).all()
  assert (result[2][:, 3] > 10).all()
  error = {n: abs(result[n] - 1).max() for n in result}
  assert error[4] < 0.5 * error[3] < 0.5 * error[2]


def test_random_permutation():
  permutation = shuffle.random_permutation(jax.random.key(0), 32)
  assert permutation.dtype == jnp.int32
  assert is_bijection(np.asarray(permutation), 32)
  other = shuffle.random_permutation(jax.random.key(1), 32)
  assert (permutation == other).mean() < 0.05
