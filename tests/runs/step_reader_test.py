"""Reading steps: passing errors are not damage, and a run may delete them."""

import contextlib
import errno
import os
import resource
import shutil
import threading
import types

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
from ultramem_jax.runs import (
  array_reader,
  checkpoint,
  step_dirs,
  step_reader,
  step_writer,
)
from ultramem_jax.settings import errors


def params():
  return {"params": abstract(make_items(0)["params"])}


@contextlib.contextmanager
def no_files_left(step_dir):
  """As for a process that has too many files open."""
  limits = resource.getrlimit(resource.RLIMIT_NOFILE)
  highest = max(int(name) for name in os.listdir("/proc/self/fd"))
  resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
  held = []
  with contextlib.suppress(OSError):
    while True:
      held.append(os.open(os.devnull, os.O_RDONLY))
  yield
  resource.setrlimit(resource.RLIMIT_NOFILE, limits)
  for fd in held:
    os.close(fd)


@contextlib.contextmanager
def link_in_a_circle(step_dir):
  """As a mount that is not there: the file has a name, and cannot be opened."""
  path = largest_file(step_dir)
  kept = path.rename(step_dir / ".kept")
  path.symlink_to(path)
  yield
  path.unlink()
  kept.rename(path)


@contextlib.contextmanager
def bad_cable(step_dir):
  """As a disk whose cable is loose: what is there cannot be read."""

  def fail(path, *_):
    raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(step_dirs, "digest", fail)
    patch.setattr(array_reader, "read", fail)
    yield


TROUBLES = {
  "EMFILE": no_files_left,
  "ELOOP": link_in_a_circle,
  "EIO": bad_cable,
}


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("name", TROUBLES)
def test_a_passing_error_is_no_damage(workdir, name, sealed):
  if not sealed:
    os.remove(workdir / "checkpoints/20/sha256.json")
  with checkpoint.Checkpointer(workdir, 5) as saver:
    items = abstract(make_items(0))
    if name == "EMFILE":  # what is loaded and started once
      saver.restore_latest(items)
    with TROUBLES[name](workdir / "checkpoints/20"):
      caught = []
      for restore in (
        lambda: saver.restore_latest(items),
        lambda: checkpoint.restore(workdir, items),
      ):
        try:
          restore()
        except OSError as error:
          caught.append(error)
    assert len(caught) == 2 and all("\n" not in str(e) for e in caught)
    assert saver.restore_latest(items).step == 20
  assert listing(workdir) == ["10", "20"]


def test_what_cannot_be_told_is_not_pruned(workdir):
  """The best step must not be lost because its loss cannot be read now."""
  save_steps(workdir, [30], losses={30: 1.0})
  facts = workdir / "checkpoints/30/_CHECKPOINT_METADATA"
  kept = facts.rename(facts.with_name(".kept"))
  facts.symlink_to(facts)
  save_steps(workdir, [40, 50], keep=1)
  assert listing(workdir) == ["10", "20", "30", "40", "50"]
  facts.unlink()
  kept.rename(facts)
  save_steps(workdir, [60], keep=1)
  assert listing(workdir) == ["30", "60"]


def test_what_was_set_aside_is_taken_back_by_its_number(workdir):
  root = workdir / "checkpoints"
  flip_bit(root / "20")
  assert restore_latest(workdir).step == 10
  flip_bit(root / "corrupt-20")  # mended
  (root / "corrupt-20").rename(root / "20")
  assert_equal(restore_latest(workdir).items, make_items(20))
  assert listing(workdir) == ["10", "20"]


def delete_while_reading(monkeypatch, workdir, moment):
  """Lets the run save step 30 and delete the others while 20 is read."""
  module, name = {
    "verify": (step_dirs, "verify"),
    "facts": (step_dirs, "facts"),
    "arrays": (array_reader, "read"),
  }[moment]
  original = getattr(module, name)

  def read(*arguments):
    monkeypatch.undo()
    save_steps(workdir, [30], keep=1, losses={30: 0.1})
    return original(*arguments)

  monkeypatch.setattr(module, name, read)


@pytest.mark.parametrize("sealed", [True, False])
@pytest.mark.parametrize("moment", ["verify", "facts", "arrays"])
def test_a_reader_takes_the_next_if_the_run_deletes_one(
  workdir, monkeypatch, caplog, moment, sealed
):
  if not sealed:
    os.remove(workdir / "checkpoints/20/sha256.json")
  delete_while_reading(monkeypatch, workdir, moment)
  restored = checkpoint.restore(workdir, params())
  assert restored.step == 30
  assert_equal(restored.items["params"], make_items(30)["params"])
  assert listing(workdir) == ["30"]
  assert "damaged" not in caplog.text


def test_a_reader_of_the_best_takes_the_new_best(tmp_path, monkeypatch):
  save_steps(tmp_path, [10, 20], losses={10: 2.0, 20: 3.0})
  delete_while_reading(monkeypatch, tmp_path, "arrays")
  assert checkpoint.restore(tmp_path, params(), "best").step == 30


def test_a_reader_of_a_number_is_told_that_it_is_gone(workdir, monkeypatch):
  delete_while_reading(monkeypatch, workdir, "arrays")
  with pytest.raises(
    errors.CheckpointError, match="no checkpoint 20; saved: 3"
  ):
    checkpoint.restore(workdir, params(), 20)


def test_readers_beside_a_run_always_find_one(tmp_path):
  save_steps(tmp_path, [1])
  done = threading.Event()

  def run():
    save_steps(tmp_path, range(2, 9), keep=1)
    done.set()

  writer = threading.Thread(target=run)
  writer.start()
  steps = []
  while not done.is_set():
    restored = checkpoint.restore(tmp_path, params())
    assert_equal(restored.items["params"], make_items(restored.step)["params"])
    steps.append(restored.step)
  writer.join()
  assert steps == sorted(steps) and len(set(steps)) > 2


def test_a_copy_of_another_step_is_damaged(workdir, caplog):
  root = workdir / "checkpoints"
  shutil.copytree(root / "10", root / "30")
  shutil.rmtree(root / "20")
  shutil.copytree(root / "10", root / "20")
  assert restore_latest(workdir).step == 10
  assert listing(workdir) == ["10", "corrupt-20", "corrupt-30"]
  assert "step 30 is damaged (it is a copy of step 10)" in caplog.text


@pytest.mark.parametrize(
  "seal", [b"{}", b"[]", b"null", b"", b"\xff", b"[" * 100_000]
)
def test_a_seal_that_vouches_for_nothing_is_damage(workdir, seal):
  step_dir = workdir / "checkpoints/20"
  flip_bit(step_dir)
  (step_dir / "sha256.json").write_bytes(seal)
  assert restore_latest(workdir).step == 10
  assert listing(workdir) == ["10", "corrupt-20"]


def test_files_that_the_seal_does_not_know_are_damage(workdir):
  root = workdir / "checkpoints"
  # What file systems, and kills, leave.
  for name in (".nfs0001", "params/.DS_Store", ".sha256.json.1f.tmp"):
    (root / "20" / name).write_text("x")
  assert restore_latest(workdir).step == 20
  (root / "20/params/d/more").write_text("x")
  assert restore_latest(workdir).step == 10


def test_what_is_saved_is_opened_before_it_counts(workdir, monkeypatch):
  original = step_writer.start

  def start_and_lose(path, items, facts):
    """As a file system that takes files and does not keep them."""
    original(path, items, facts).result()
    shutil.rmtree(path / "rest")
    return types.SimpleNamespace(result=lambda: None)

  with checkpoint.Checkpointer(workdir, 1) as saver:
    monkeypatch.setattr(step_writer, "start", start_and_lose)
    with pytest.raises(errors.CheckpointError, match="cannot be opened again"):
      saver.save(30, make_items(30), {})
    monkeypatch.undo()
  # Nor are older ones deleted for it.
  assert listing(workdir) == ["10", "20", "30"]
  assert not (workdir / "checkpoints/30/sha256.json").exists()
  assert restore_latest(workdir).step == 20


def test_where_nothing_can_be_saved_no_run_starts(tmp_path):
  """Orbax saves below such a path, and finds nothing there."""
  with pytest.raises(
    errors.CheckpointError, match="no checkpoint can be saved"
  ):
    checkpoint.Checkpointer(tmp_path / "a[x]", 1)
  (tmp_path / "run" / "checkpoints" / ".trial-1").mkdir(parents=True)
  checkpoint.Checkpointer(tmp_path / "run", 1).close()
  assert listing(tmp_path / "run") == []


def test_other_arrays_than_were_saved_are_noticed(workdir):
  path = workdir / "checkpoints/20"
  step_reader.require_readable(path, make_items(20))
  other = {**make_items(20), "more": {"x": make_items(20)["buffers"]["order"]}}
  with pytest.raises(step_dirs.Damaged, match="other arrays"):
    step_reader.require_readable(path, other)
  os.remove(largest_file(path))
  shutil.rmtree(path / "rest")
  with pytest.raises(ValueError, match="NOT_FOUND"):
    step_reader.require_readable(path, make_items(20))
