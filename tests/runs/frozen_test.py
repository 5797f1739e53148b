"""Frozen parameters: saved once, beside the checkpoints that refer to them."""

import shutil

import pytest

from tests.runs.saved_steps import (
  abstract,
  assert_equal,
  flip_bit,
  listing,
  make_items,
)
from ultramem_jax.runs import checkpoint, step_dirs
from ultramem_jax.settings.errors import CheckpointError

TABLE = make_items(0)["params"]["table"]


def items(step):
  """Those of a step, of which "table" is the same in each."""
  made = make_items(step)
  return {**made, "params": {**made["params"], "table": TABLE}}


def save(workdir, steps, frozen=("table",), keep=5):
  """Goes on from the newest checkpoint, as a run does."""
  with checkpoint.Checkpointer(workdir, keep) as saver:
    restored = saver.restore_latest(abstract(items(0)))
    saver.freeze({name: items(0)["params"][name] for name in frozen})
    for step in steps:
      saver.save(step, items(step), {})
  return restored


def stores(workdir):
  return sorted(path.name for path in (workdir / "frozen").iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("frozen") / "run"
  save(workdir, [10, 20])
  return workdir


@pytest.fixture
def run(saved, tmp_path):
  shutil.copytree(saved, tmp_path / "run")
  return tmp_path / "run"


def test_they_are_saved_once_and_read_with_each_step(run):
  for step in (10, 20):
    held = step_dirs.facts(run / "checkpoints" / str(step))["arrays"]
    assert "params/half" in held and "params/table" not in held
    restored = checkpoint.restore(run, abstract(items(0)), step)
    assert_equal(restored.items, items(step))
  part = {"params": abstract(items(0))["params"]}
  assert_equal(
    checkpoint.restore(run, part).items["params"], items(20)["params"]
  )
  # A start that goes on from there saves them no second time.
  written = (run / "frozen/1/sha256.json").stat().st_mtime_ns
  assert_equal(save(run, [30]).items, items(20))
  assert stores(run) == ["1"]
  assert (run / "frozen/1/sha256.json").stat().st_mtime_ns == written
  assert_equal(save(run, []).items, items(30))


def test_what_kills_leave_is_deleted(tmp_path):
  """Before a checkpoint refers to them; a run then starts again."""
  run = tmp_path / "run"
  save(run, [])
  (run / "frozen/1/sha256.json").unlink()  # of a kill before the seal
  (run / "frozen/7.orbax-checkpoint-tmp").mkdir()
  (run / "frozen/8.deleting").mkdir()
  save(run, [10])
  assert stores(run) == ["2"]
  assert_equal(save(run, []).items, items(10))


def flip(run):
  flip_bit(run / "frozen/1")


def lose(run):
  shutil.rmtree(run / "frozen")


def unseal(run):
  (run / "frozen/1/sha256.json").unlink()


def swap(run):
  """The store of another run, sound in itself."""
  other = run.with_name("other")
  with checkpoint.Checkpointer(other, 5) as saver:
    saver.freeze({"table": TABLE + 1})
  shutil.rmtree(run / "frozen/1")
  shutil.copytree(other / "frozen/1", run / "frozen/1")


@pytest.mark.parametrize(
  "damage, fault",
  [
    (flip, r" has changed"),
    (lose, r"sha256\.json is missing"),
    (unseal, r"sha256\.json is missing"),
    (swap, r"is of other parameters"),
  ],
)
def test_damage_is_told_and_a_copy_mends_it(run, saved, damage, fault):
  damage(run)
  for read in (
    lambda: save(run, []),
    lambda: checkpoint.restore(run, abstract(items(0))),
  ):
    with pytest.raises(CheckpointError, match=rf"run/frozen/1, .*{fault}") as e:
      read()
    assert "\n" not in str(e.value)
  assert listing(run) == ["10", "20"]
  shutil.rmtree(run / "frozen", ignore_errors=True)
  shutil.copytree(saved / "frozen", run / "frozen")
  assert_equal(save(run, []).items, items(20))


def test_where_they_are_lost_in_a_run_its_checkpoints_hold_them(run):
  with checkpoint.Checkpointer(run, 5) as saver:
    saver.restore_latest(abstract(items(0)))
    saver.freeze({"table": TABLE})
    lose(run)
    saver.save(30, items(30), {})
  assert_equal(save(run, []).items, items(30))


def test_a_damaged_step_is_set_aside_and_the_older_one_is_read(run):
  flip_bit(run / "checkpoints/20")
  assert_equal(save(run, []).items, items(10))
  assert listing(run) == ["10", "corrupt-20"]


def test_other_parameters_are_frozen_from_a_step_on(run):
  """A store stays for as long as a checkpoint refers to it."""
  save(run, [30], frozen=("half", "table"))
  held = step_dirs.facts(run / "checkpoints/30")["arrays"]
  assert not any(name.startswith("params/") for name in held)
  assert stores(run) == ["1", "2"]
  save(run, [40], frozen=())
  assert stores(run) == ["1", "2"]
  with checkpoint.Checkpointer(run, 1) as saver:
    saver.save(50, items(50), {})
  assert listing(run) == ["50"] and stores(run) == []
  assert_equal(checkpoint.restore(run, abstract(items(0))).items, items(50))


def test_a_step_that_was_set_aside_keeps_its_parameters(run):
  (run / "checkpoints/20").rename(run / "checkpoints/corrupt-20")
  (run / "checkpoints/10").rename(run / "checkpoints/corrupt-10")
  with checkpoint.Checkpointer(run, 1) as saver:
    saver.save(30, items(30), {})
  assert stores(run) == ["1"]
