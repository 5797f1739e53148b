"""The directories of saved steps: which are kept, and what damage does."""

import os
import re
import shutil

import pytest

from tests.runs.saved_steps import (
  abstract,
  assert_equal,
  flip_bit,
  largest_file,
  listing,
  make_items,
  restore_latest,
  save_steps,
)
from ultramem_jax.runs import checkpoint
from ultramem_jax.settings import errors


def test_keeps_the_newest_and_the_best(tmp_path):
  losses = {1: 3.0, 2: 1.0, 3: 2.0, 5: float("nan")}
  save_steps(tmp_path, range(1, 7), keep=2, losses=losses)
  assert listing(tmp_path) == ["2", "5", "6"]
  target = abstract({"params": make_items(0)["params"]})
  best = checkpoint.restore(tmp_path, target, "best")
  assert (best.step, best.valid_loss) == (2, 1.0)
  assert_equal(best.items["params"], make_items(2)["params"])
  diverged = checkpoint.restore(tmp_path, target, 5)
  assert (diverged.step, diverged.valid_loss) == (5, None)
  with pytest.raises(errors.CheckpointError, match="saved: 2, 5, 6"):
    checkpoint.restore(tmp_path, target, 4)
  # Runs that go on prune by losses of earlier runs too; equals: the later.
  save_steps(tmp_path, [7, 8, 9], keep=1, losses={7: 1.0, 8: 1.5})
  assert listing(tmp_path) == ["7", "9"]


def truncate(step_dir):
  path = largest_file(step_dir)
  os.truncate(path, path.stat().st_size // 2)


def remove_arrays(step_dir):
  os.remove(largest_file(step_dir))


def remove_item(step_dir):
  shutil.rmtree(step_dir / "rest")


def remove_facts(step_dir):
  os.remove(step_dir / "_CHECKPOINT_METADATA")


def empty(step_dir):
  shutil.rmtree(step_dir)
  step_dir.mkdir()


def unseal_and(damage):
  def damage_unsealed(step_dir):
    os.remove(step_dir / "sha256.json")
    damage(step_dir)

  return damage_unsealed


def break_seal(step_dir):
  os.truncate(step_dir / "sha256.json", 50)


DAMAGES = {
  "flip_bit": (flip_bit, "has changed"),
  "truncate": (truncate, "has changed"),
  "remove_arrays": (remove_arrays, "params/.* is missing"),
  "remove_item": (remove_item, "rest/.* is missing"),
  "remove_facts": (remove_facts, "_CHECKPOINT_METADATA is missing"),
  "break_seal": (break_seal, "JSONDecodeError"),
  "empty": (empty, "."),
  "unsealed_truncate": (unseal_and(truncate), "."),
  "unsealed_remove_arrays": (unseal_and(remove_arrays), "Error reading"),
  "unsealed_remove_item": (unseal_and(remove_item), "."),
  "unsealed_remove_facts": (unseal_and(remove_facts), "."),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_falls_back_from_damage(workdir, caplog, name):
  damage, cause = DAMAGES[name]
  damage(workdir / "checkpoints/20")
  # A reader of a run that may be alive takes the older one, moving nothing.
  params = {"params": abstract(make_items(0)["params"])}
  if name != "unsealed_remove_item":  # which leaves params readable
    assert checkpoint.restore(workdir, params).step == 10
    with pytest.raises(errors.CheckpointError, match=r"20 of .* damaged"):
      checkpoint.restore(workdir, params, 20)
  assert listing(workdir) == ["10", "20"]
  caplog.clear()
  restored = restore_latest(workdir)
  assert restored.step == 10
  assert_equal(restored.items, make_items(10))
  assert listing(workdir) == ["10", "corrupt-20"]
  [record] = [r for r in caplog.records if "set aside" in r.getMessage()]
  message = record.getMessage()
  assert "\n" not in message
  assert re.search(
    rf"step 20 is damaged \(.*{cause}.*\): set aside as corrupt-20", message
  )
  # The run goes on and saves that step again.
  save_steps(workdir, [20])
  assert_equal(restore_latest(workdir).items, make_items(20))
  flip_bit(workdir / "checkpoints/20")
  assert restore_latest(workdir).step == 10
  assert listing(workdir) == ["10", "corrupt-20", "corrupt-20-2"]


def test_unsealed_but_readable_is_sound(workdir):
  os.remove(workdir / "checkpoints/20/sha256.json")
  assert_equal(restore_latest(workdir).items, make_items(20))


def test_all_damaged_is_never_a_fresh_start(workdir):
  flip_bit(workdir / "checkpoints/10")
  truncate(workdir / "checkpoints/20")
  for _ in range(2):  # the second time, nothing but corrupt-* is left
    with pytest.raises(
      errors.CheckpointError, match=r"every checkpoint .*corrupt-10, corrupt-20"
    ):
      restore_latest(workdir)


def test_leftovers_are_removed(workdir):
  for name in ("30.orbax-checkpoint-tmp", "10.deleting"):
    shutil.copytree(workdir / "checkpoints/20", workdir / "checkpoints" / name)
  assert restore_latest(workdir).step == 20
  assert listing(workdir) == ["10", "20"]
