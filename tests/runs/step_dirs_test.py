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


def test_unsealed_but_readable_is_sound_and_sealed_from_then_on(workdir):
  os.remove(workdir / "checkpoints/20/sha256.json")
  assert_equal(restore_latest(workdir).items, make_items(20))
  flip_bit(workdir / "checkpoints/20")
  assert restore_latest(workdir).step == 10


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


def strange(root):
  """What is in a folder of checkpoints, and is none."""
  for name in ("0015", "²", "٣٠", "-5", "1e3", "99999999999", "notes", ".x"):
    (root / name).mkdir()
    (root / name / "file").write_text("")
  (root / "19").write_text("")
  (root / "18").symlink_to(root / "absent")


def test_strange_names_are_left_alone(workdir):
  root = workdir / "checkpoints"
  strange(root)
  before = listing(workdir)
  assert restore_latest(workdir).step == 20
  save_steps(workdir, [30, 40], keep=1)
  assert set(listing(workdir)) == {*before, "40"} - {"10", "20"}


@pytest.mark.parametrize("kind", ["empty", "file", "copy", "link", "circle"])
def test_what_has_the_name_of_a_step_is_set_aside(workdir, kind, caplog):
  """It appears while the run is on its way to that step."""
  root = workdir / "checkpoints"
  with checkpoint.Checkpointer(workdir, 5) as saver:
    if kind == "empty":
      (root / "30").mkdir()
    elif kind == "file":
      (root / "30").write_text("")
    elif kind == "copy":
      shutil.copytree(root / "20", root / "30")
    else:
      (root / "30").symlink_to(root / {"link": "20", "circle": "absent"}[kind])
    assert saver.save(30, make_items(30), {})
  assert "corrupt-30" in caplog.text
  assert_equal(restore_latest(workdir).items, make_items(30))
  assert listing(workdir) == ["10", "20", "30", "corrupt-30"]
  assert_equal(checkpoint.restore(workdir, {}, 20).items, {})


def test_steps_of_another_run_neither_count_nor_go(workdir):
  """They appear beyond the step that the run has reached, or below it."""
  root = workdir / "checkpoints"
  save_steps(workdir.with_name("other"), [99])
  with checkpoint.Checkpointer(workdir, 1) as saver:
    shutil.copytree(workdir.with_name("other") / "checkpoints/99", root / "99")
    (root / "15").mkdir()
    saver.save(30, make_items(30), {})
  assert listing(workdir) == ["15", "30", "99"]
  assert checkpoint.restore(workdir, {}, 30).step == 30


def test_links_are_deleted_and_not_what_they_name(workdir, tmp_path):
  root = workdir / "checkpoints"
  elsewhere = tmp_path / "elsewhere"
  (root / "10").rename(elsewhere)
  (root / "10").symlink_to(elsewhere)
  (root / "5.deleting").symlink_to(elsewhere)
  (root / "7.orbax-checkpoint-tmp-1").write_text("")
  before = sorted(elsewhere.rglob("*"))
  save_steps(workdir, [30], keep=1)
  assert listing(workdir) == ["30"]
  assert sorted(elsewhere.rglob("*")) == before


def test_a_loss_may_come_after_its_step(workdir):
  with checkpoint.Checkpointer(workdir, 1) as saver:
    saver.save(30, make_items(30), {}, 2.0)
    saver.save(40, make_items(40), {}, validation_due=True)
    restored = saver.restore_latest(abstract(make_items(0)))
    assert (restored.valid_loss, restored.validation_due) == (None, True)
    saver.add_loss(40, 1.0)
    restored = saver.restore_latest(abstract(make_items(0)))
    assert (restored.valid_loss, restored.validation_due) == (1.0, False)
    assert checkpoint.restore(workdir, {}, "best").step == 40
    saver.save(50, make_items(50), {}, 3.0)
  assert listing(workdir) == ["40", "50"]


def test_a_loss_that_is_not_finite_is_no_longer_due(workdir):
  with checkpoint.Checkpointer(workdir, 5) as saver:
    saver.save(30, make_items(30), {}, validation_due=True)
    saver.add_loss(30, float("nan"))
  restored = checkpoint.restore(workdir, {})
  assert (restored.valid_loss, restored.validation_due) == (None, False)


def test_a_step_is_on_the_disk_before_older_ones_are_deleted(
  workdir, monkeypatch
):
  """So that a power cut leaves one or the other."""
  root, done = workdir / "checkpoints", []
  real = {name: getattr(os, name) for name in ("fsync", "replace", "rename")}

  def fsync(fd):
    done.append(("fsync", os.readlink(f"/proc/self/fd/{fd}")))
    real["fsync"](fd)

  def rename(source, target):
    done.append(("rename", str(target)))
    real["rename"](source, target)

  monkeypatch.setattr(os, "fsync", fsync)
  monkeypatch.setattr(os, "rename", rename)
  save_steps(workdir, [30], keep=1)
  deleted = done.index(("rename", str(root / "10.deleting")))
  flushed = {path for name, path in done[:deleted] if name == "fsync"}
  expected = {root, root / "30", *(root / "30").rglob("*")}
  # The seal is flushed under the name that it has before it is whole.
  expected.remove(root / "30/sha256.json")
  assert {str(path) for path in expected} <= flushed
  assert any("sha256.json" in path for path in flushed)
