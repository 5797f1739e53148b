"""Patches: exact both ways, merged, and refused where they do not fit."""

import pathlib

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.train.small_steps import assert_same_bits
from ultramem_jax import testing
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.tools import patch as patch_lib

TABLE = "params/memory_0/values"


def variables(dtype="float32", **overrides):
  """A model's variables as numpy arrays, by path."""
  config = testing.small_config(
    model__memory__storage__table_dtype=dtype, **overrides
  )
  found = testing.random_state(config).variables()
  return traverse_util.flatten_dict(jax.tree.map(np.array, found), sep="/")


def nested(flat):
  # A copy, as what is changed is taken over.
  copied = {name: jax.numpy.array(x) for name, x in flat.items()}
  return traverse_util.unflatten_dict(copied, sep="/")


def tuned(flat, rows, seed=1):
  """The same with other numbers in some rows of the table."""
  table = flat[TABLE].copy()
  rng = np.random.default_rng(seed)
  table[rows] = rng.normal(size=(len(rows), table.shape[1])).astype(table.dtype)
  if table.dtype == np.uint16:
    table[rows] = flat[TABLE][rows] + 1
  return {**flat, TABLE: table}


def make_patch(base, rows, seed=1):
  return patch_lib.difference(nested(base), nested(tuned(base, rows, seed)))


def assert_goes_both_ways(patch, base, other, folder):
  """From its file, a patch makes one model of the other, to the bit."""
  path = str(folder / "patch.safetensors")
  patch_lib.write(path, patch)
  held = patch_lib.read(path)
  after = patch_lib.applied(nested(base), held)
  assert_same_bits(after, nested(other))
  back = patch_lib.reverted(after, held)
  assert_same_bits(back, nested(base))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_patch_is_applied_and_reverted_to_the_bit(dtype, tmp_path):
  base = variables(dtype)
  # -0.0 is another number than 0.0, and computed buffers may differ.
  base[TABLE][3, 0] = 0
  other = tuned(base, [5, 9, 40])
  if dtype == "float32":
    other[TABLE][3, 0] = -0.0
  other["buffers/memory_0/u"] = other["buffers/memory_0/u"] + 1
  patch = patch_lib.difference(nested(base), nested(other))
  assert patch.changes.keys() == {TABLE, "buffers/memory_0/u"}
  rows = [5, 9, 40] if dtype == "bfloat16" else [3, 5, 9, 40]
  np.testing.assert_array_equal(patch.changes[TABLE].rows, rows)
  assert_goes_both_ways(patch, base, other, tmp_path)


def test_a_memory_that_learned_as_a_whole_is_a_patch(tmp_path):
  """Its keys, queries and projections, and the number of its gate."""
  base = variables(model__memory__gate="scalar")
  learned = {
    name: x + 1 if name.startswith("params/memory_0/") else x
    for name, x in tuned(base, [5, 9]).items()
  }
  learned[TABLE] = tuned(base, [5, 9])[TABLE]
  patch = patch_lib.difference(nested(base), nested(learned))
  names = {name for name in base if name.startswith("params/memory_0/")}
  assert patch.changes.keys() == names and len(names) > 5
  assert {base[name].ndim for name in names} >= {0, 2, 5}
  assert list(patch.changes[TABLE].rows) == [5, 9]
  assert_goes_both_ways(patch, base, learned, tmp_path)
  moved = {**base, "params/memory_0/query": base["params/memory_0/query"] + 1}
  with pytest.raises(ConfigError, match=r"memory_0/query.*sha256"):
    patch_lib.applied(nested(moved), patch)


def test_a_patch_meets_no_other_model():
  base = variables()
  patch = make_patch(base, [5, 9])
  moved = tuned(base, [50], seed=2)
  with pytest.raises(ConfigError, match=f"{TABLE} does not have the sha256"):
    patch_lib.applied(nested(moved), patch)
  # Nor is it reverted where it is not, or where more has changed since.
  with pytest.raises(ConfigError, match="sha256"):
    patch_lib.reverted(nested(tuned(moved, [5, 9])), patch)
  with pytest.raises(ConfigError, match="sha256"):
    patch_lib.applied(nested(tuned(base, [5, 9])), patch)
  smaller = {**base, TABLE: base[TABLE][:8]}
  with pytest.raises(ConfigError, match="does not fit the patch"):
    patch_lib.reverted(nested(smaller), patch)


def test_what_else_differs_is_named():
  base = variables()
  name = "params/block_0/mlp/up/kernel"
  assert name in base
  other = {**tuned(base, [1]), name: base[name] + 1}
  with pytest.raises(ConfigError, match=f"tuned = '{name}': differs"):
    patch_lib.difference(nested(base), nested(other))
  other = {**tuned(base, [1]), "params/lora_a": np.ones(2)}
  with pytest.raises(ConfigError, match=r"params/lora_a \(only the other\)"):
    patch_lib.difference(nested(base), nested(other))
  with pytest.raises(ConfigError, match="equals the base bit for bit"):
    patch_lib.difference(nested(base), nested(base))


def test_settings_are_no_part_of_a_patch():
  base = testing.small_config().model
  other = testing.small_config(model__memory__top_m=2).model
  with pytest.raises(ConfigError, match=r"top_m = 2 \(there 3\)"):
    patch_lib.require_same_settings(base, other)
  harmless = testing.small_config(model__memory__aux_loss_weight=0.5).model
  patch_lib.require_same_settings(base, harmless)


def test_merging_makes_the_changes_of_both_and_names_conflicts():
  base = variables()
  one, two = make_patch(base, [5, 9]), make_patch(base, [2, 40], seed=2)
  both = patch_lib.merged([one, two], "refuse")
  step = tuned(tuned(base, [5, 9]), [2, 40], seed=2)
  after = patch_lib.applied(nested(base), both)
  assert_same_bits(after, nested(step))
  assert_same_bits(patch_lib.reverted(after, both), nested(base))
  # The same change twice is no conflict.
  same = patch_lib.merged([both, one], "refuse")
  assert_same_bits(same, both)
  other = make_patch(base, [7, 9], seed=3)
  with pytest.raises(ConfigError, match=f"{TABLE} in the rows 9'"):
    patch_lib.merged([one, other], "refuse")
  for choice, winner in (("first", one), ("last", other)):
    change = patch_lib.merged([one, other], choice).changes[TABLE]
    np.testing.assert_array_equal(change.rows, [5, 7, 9])
    held = winner.changes[TABLE]
    assert_same_bits(change.new[2], held.new[list(held.rows).index(9)])
    assert_same_bits(change.old, base[TABLE][[5, 7, 9]])
  elsewhere = make_patch(tuned(base, [1]), [5])
  with pytest.raises(ConfigError, match="between the bases"):
    patch_lib.merged([one, elsewhere], "last")


def test_patches_are_listed_by_size(tmp_path):
  base = variables()
  paths = []
  for name, rows in (("small", [5]), ("large", list(range(30)))):
    paths.append(str(tmp_path / name))
    patch_lib.write(paths[-1], make_patch(base, rows))
  lines = patch_lib.describe(paths).splitlines()
  assert [line.split()[4] for line in lines] == [paths[1], paths[0]]
  assert "memory_0/values 30" in lines[0]
  (tmp_path / "none").write_bytes(b"nothing")
  small = patch_lib.read(paths[0])
  broken = {
    "elsewhere": small._replace(base={}),
    "list": small._replace(base=list(small.base)),
    **{
      str(shape): small._replace(
        changes={
          name: change._replace(rows=np.zeros(shape, np.int32))
          for name, change in small.changes.items()
        }
      )
      for shape in ((0,), (1, 1), ())
    },
  }
  for name, patch in broken.items():
    patch_lib.write(str(tmp_path / name), patch)
  content = bytearray(pathlib.Path(paths[0]).read_bytes())
  content[-1] ^= 1  # a bit of a number
  (tmp_path / "damaged").write_bytes(content)
  for name, match in (
    *dict.fromkeys(("none", *broken), "is not a patch").items(),
    ("damaged", "its sha256 is another"),
    ("absent", "no such file"),
  ):
    with pytest.raises(ConfigError, match=match):
      patch_lib.read(str(tmp_path / name))


def test_frozen_parameters_may_be_held_in_fewer_bits():
  """Of published weights in bfloat16, float32 holds the same numbers."""
  base = variables()
  name = "params/block_0/mlp/up/kernel"
  narrow = jax.numpy.array(base[name], "bfloat16")
  exact = {**base, name: np.array(narrow.astype("float32"))}
  other = {**tuned(exact, [1, 2]), name: np.array(narrow)}
  patch = patch_lib.difference(nested(exact), nested(other))
  assert patch.changes.keys() == {TABLE}
  with pytest.raises(ConfigError, match=rf"{name} \(float32.*frozen_dtype"):
    patch_lib.difference(nested(base), nested(other))
