"""Tests of checkpoints, with real files."""

import math
import os
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from tests.runs.saved_steps import (
  DATA,
  abstract,
  assert_equal,
  listing,
  make_items,
  restore_latest,
)
from ultramem_jax.runs import array_reader, checkpoint, step_writer
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings import errors


def test_round_trip_is_exact(workdir):
  restored = restore_latest(workdir)
  assert restored.step == 20
  assert_equal(restored.items, make_items(20))
  assert isinstance(
    restored.items["rest"].opt_state[1][0], optax.ScaleByAdamState
  )
  assert restored.data_state == DATA
  assert restored.valid_loss is None


def test_arrays_may_be_donated_as_soon_as_save_returns(tmp_path):
  add = jax.jit(lambda x: x + 1, donate_argnums=0)
  x = jnp.zeros((1 << 20,))
  with checkpoint.Checkpointer(tmp_path, 5) as saver:
    for step in range(3):
      saver.save(step, {"params": {"x": x}}, {})
      place = x.unsafe_buffer_pointer()
      x = add(add(x))
      # In place, also right after a save: no copy of the state is made.
      assert x.unsafe_buffer_pointer() == place
  for step in range(3):
    loaded = checkpoint.restore(tmp_path, abstract({"params": {"x": x}}), step)
    assert np.all(np.asarray(loaded.items["params"]["x"]) == 2 * step)


def test_restores_a_part(workdir):
  items = make_items(20)
  part = {name: items[name] for name in ("params", "buffers")}
  shutil.rmtree(workdir / "checkpoints/20/rest")  # so it cannot be read
  os.remove(workdir / "checkpoints/20/sha256.json")
  assert_equal(checkpoint.restore(workdir, abstract(part)).items, part)


def test_restores_to_another_mesh(workdir):
  mesh = jax.make_mesh(
    (1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  items = make_items(20)
  sharding = NamedSharding(mesh, P("data"))
  target = {
    "params": jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      items["params"],
    )
  }
  restored = checkpoint.restore(workdir, target)
  assert restored.items["params"]["table"].sharding == sharding
  assert_equal(restored.items["params"], items["params"])


def test_fresh_only_where_nothing_was_saved(tmp_path):
  assert restore_latest(tmp_path) is None
  with pytest.raises(errors.CheckpointError, match="holds no checkpoint"):
    checkpoint.restore(tmp_path, {})
  with pytest.raises(errors.CheckpointError, match="holds no checkpoint"):
    checkpoint.restore(tmp_path / "absent", {})


def test_best_without_any_validation_is_refused(workdir):
  with pytest.raises(errors.CheckpointError, match="best; saved: 10, 20"):
    checkpoint.restore(workdir, {}, "best")


def test_saving_a_saved_step_does_nothing(workdir):
  with checkpoint.Checkpointer(workdir, 5) as saver:
    assert not saver.save(20, make_items(1), DATA)
  assert_equal(restore_latest(workdir).items, make_items(20))


def test_data_that_json_changes_is_refused(tmp_path):
  with checkpoint.Checkpointer(tmp_path, 5) as saver:
    for data in ({0: "key"}, {"0": (1, 2)}):
      with pytest.raises(TypeError, match="JSON unchanged"):
        saver.save(1, make_items(1), data)


@pytest.mark.parametrize(
  "target, difference",
  [
    (
      jax.ShapeDtypeStruct((64, 9), jnp.float32),
      r"other arrays: params/table is float32\[64, 8\] there, "
      r"float32\[64, 9\] here",
    ),
    (
      jax.ShapeDtypeStruct((64, 8), jnp.bfloat16),
      r"params/table is float32\[64, 8\] there, bfloat16\[64, 8\] here",
    ),
    (None, r"of another model; only there: params/table\."),
  ],
)
def test_another_model_is_refused_not_set_aside(workdir, target, difference):
  items = abstract(make_items(0))
  items["params"] = {**items["params"], "table": target}
  for unseal in (False, True):
    if unseal:
      os.remove(workdir / "checkpoints/20/sha256.json")
    with (
      checkpoint.Checkpointer(workdir, 5) as saver,
      pytest.raises(errors.TargetError, match=difference),
    ):
      saver.restore_latest(items)
  assert listing(workdir) == ["10", "20"]


def test_a_run_that_was_written_without_an_optimizer_is_not_continued(tmp_path):
  items = make_items(20)
  with checkpoint.Checkpointer(tmp_path, 5) as saver:
    saver.save(20, {k: v for k, v in items.items() if k != "rest"}, {})
    with pytest.raises(errors.TargetError, match="no state of an optimizer"):
      saver.restore_latest(abstract(items))


def test_restoring_into_a_changed_model_tells_what_differs(workdir):
  items = abstract(make_items(0))
  names = [f"block_{n}" for n in range(9)]
  leaf = items["params"].pop("table")
  items["params"] |= dict.fromkeys(names, leaf)
  items["buffers"] = {"order": jax.ShapeDtypeStruct((5,), jnp.int32)}
  with pytest.raises(errors.TargetError) as refused:
    checkpoint.restore(workdir, items)
  told = str(refused.value)
  assert (
    "20 is of another model; other arrays: buffers/order is int32[7] there, "
    "int32[5] here; missing there: params/block_0, params/block_1, "
    "params/block_2, ... (9 in all); only there: params/table. Go on "
  ) in told
  assert told.endswith("init_from takes what is the same in both")


def test_failure_to_read_a_sealed_step_is_no_damage(workdir, monkeypatch):
  def fail(*_):
    raise OSError("the network is away")

  monkeypatch.setattr(array_reader, "read", fail)
  with pytest.raises(OSError, match="the network is away"):
    restore_latest(workdir)
  assert listing(workdir) == ["10", "20"]


@pytest.mark.filterwarnings("ignore")  # of threads that Orbax leaves behind
def test_failed_save_is_raised_and_leaves_the_older(workdir):
  noise = np.random.default_rng(0).random((1 << 18,))
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  with checkpoint.Checkpointer(workdir, 1) as saver:
    # Files of at most 64 KiB: writing fails as it does on a full disk.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    try:
      with pytest.raises(errors.CheckpointError, match="be written"):
        saver.save(30, {"params": {"x": jnp.asarray(noise)}}, DATA)
        saver.wait()
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, limits)
  assert restore_latest(workdir).step == 20
  assert listing(workdir) == ["10", "20"]


def test_second_run_in_a_workdir_is_refused(workdir):
  with (
    checkpoint.Checkpointer(workdir, 5) as saver,
    pytest.raises(errors.CheckpointError, match="another process"),
  ):
    del saver
    checkpoint.Checkpointer(workdir, 5)
  assert restore_latest(workdir).step == 20


def test_a_workdir_in_use_is_refused_and_one_without_a_run_is_not(workdir):
  refused = pytest.raises(errors.CheckpointError, match="another process")
  with checkpoint.Checkpointer(workdir, 5), refused:
    workdir_lib.require_idle(workdir)
  for path in (workdir, workdir / "none"):
    workdir_lib.require_idle(path)
    assert path == workdir or not path.exists()
  with checkpoint.Checkpointer(workdir, 5):  # nothing holds the lock
    pass


def stored_chunk(workdir, step):
  """Shape of the chunks of params/table on the disk."""
  metadata = ocp.checkpointables_metadata(workdir / f"checkpoints/{step}")
  return metadata.metadata["params"]["table"].storage_metadata.chunk_shape


@pytest.mark.parametrize(
  "shape, chunk",
  [
    ((64, 8), (32, 8)),
    ((60, 8), (30, 8)),
    ((99, 8), (11, 8)),  # not 4 pieces, which do not divide it
    ((101, 8), (101, 8)),  # not 101 pieces
    ((4, 256), (4, 256)),  # not pieces of columns
  ],
)
def test_large_tables_are_stored_in_pieces_of_rows(
  tmp_path, monkeypatch, shape, chunk
):
  monkeypatch.setattr(step_writer, "CHUNK_BYTES", 1024)
  table = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
  items = {"params": {"table": table}}
  with checkpoint.Checkpointer(tmp_path, 5) as saver:
    saver.save(1, items, {})
  assert stored_chunk(tmp_path, 1) == chunk
  assert_equal(checkpoint.restore(tmp_path, abstract(items)).items, items)
  # Pieces are not files of their own.
  assert len(list(tmp_path.glob("checkpoints/1/params/**/d/*"))) <= 2


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("change", ["delete", "rename", "replace"])
def test_a_workdir_that_goes_away_is_an_error(workdir, change, moment):
  """Neither is anything made where it was."""

  def go_away():
    if change == "delete":
      shutil.rmtree(workdir)
    else:
      workdir.rename(workdir.with_name("elsewhere"))
    if change == "replace":
      (workdir / "checkpoints").mkdir(parents=True)

  with (
    pytest.raises(errors.CheckpointError, match="was deleted, renamed or"),
    checkpoint.Checkpointer(workdir, 5) as saver,
  ):
    if moment == "before":
      go_away()
    saver.save(30, make_items(30), {})
    go_away()
  if change == "replace":
    assert listing(workdir) == []
  else:
    assert not workdir.exists()
