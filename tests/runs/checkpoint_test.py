"""Tests of checkpoints, with real files, real kills and real damage."""

import math
import os
import pathlib
import random
import re
import resource
import shutil
import socket
import subprocess
import sys
import textwrap
import time

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from orbax.checkpoint import v1 as ocp

from ultramem_jax.runs import array_reader, checkpoint
from ultramem_jax.settings import errors

DATA = {"0": {"offset": [3, None, True], "name": "é", "big": 2**60, "f": 0.1}}


@flax.struct.dataclass
class Rest:
  step: jax.Array
  opt_state: tuple
  key: jax.Array


def make_items(step):
  """Arrays of every dtype a run holds, all determined by the step."""
  key = jax.random.key(step)
  params = {
    "table": jax.random.normal(key, (64, 8)),
    "half": jax.random.normal(key, (5,), jnp.bfloat16),
  }
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
  _, opt_state = tx.update(params, tx.init(params), params)
  rest = Rest(jnp.int32(step), opt_state, jax.random.key_data(key))
  return {
    "params": params,
    "buffers": {"order": jnp.arange(7)[::-1]},
    "rest": rest,
    "nothing": {},
  }


def abstract(items):
  return jax.eval_shape(lambda: items)


def assert_equal(actual, expected):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, e in zip(
    jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True
  ):
    assert a.dtype == e.dtype
    assert np.asarray(a).tobytes() == np.asarray(e).tobytes()


def save_steps(workdir, steps, keep=5, losses=None):
  with checkpoint.Checkpointer(workdir, keep) as saver:
    for step in steps:
      loss = losses and losses.get(step)
      assert saver.save(step, make_items(step), DATA, loss)


def restore_latest(workdir):
  with checkpoint.Checkpointer(workdir, 5) as saver:
    return saver.restore_latest(abstract(make_items(0)))


def listing(workdir):
  return sorted(path.name for path in (workdir / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """A workdir with steps 10 and 20, to be copied."""
  workdir = tmp_path_factory.mktemp("saved")
  save_steps(workdir, [10, 20])
  return workdir


@pytest.fixture
def workdir(saved, tmp_path):
  return pathlib.Path(shutil.copytree(saved, tmp_path / "run"))


def test_round_trip_is_exact(workdir):
  restored = restore_latest(workdir)
  assert restored.step == 20
  assert_equal(restored.items, make_items(20))
  assert isinstance(
    restored.items["rest"].opt_state[1][0], optax.ScaleByAdamState
  )
  assert restored.data == DATA
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


def test_best_without_any_validation_is_refused(workdir):
  with pytest.raises(errors.CheckpointError, match="'best'; saved: 10, 20"):
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


def largest_file(step_dir):
  return max(
    (f for f in (step_dir / "params").rglob("*") if f.is_file()),
    key=lambda f: f.stat().st_size,
  )


def flip_bit(step_dir):
  path = largest_file(step_dir)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


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


@pytest.mark.parametrize(
  "target, difference",
  [
    (
      jax.ShapeDtypeStruct((64, 9), jnp.float32),
      r"params/table is float32\[64, 8\] there, float32\[64, 9\] here",
    ),
    (
      jax.ShapeDtypeStruct((64, 8), jnp.bfloat16),
      r"params/table is float32\[64, 8\] there, bfloat16\[64, 8\] here",
    ),
    (None, r"params/table is float32\[64, 8\] there, absent here"),
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
  with pytest.raises(
    errors.TargetError,
    match=r"params/new is absent.*\. If another version of UltraMem-JAX wrote "
    "it, go on with that version, or use another --workdir$",
  ):
    checkpoint.restore(
      workdir,
      {
        "params": {
          **abstract(make_items(0)["params"]),
          "new": target or items["buffers"]["order"],
        }
      },
    )


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


def test_leftovers_are_removed(workdir):
  for name in ("30.orbax-checkpoint-tmp", "10.deleting"):
    shutil.copytree(workdir / "checkpoints/20", workdir / "checkpoints" / name)
  assert restore_latest(workdir).step == 20
  assert listing(workdir) == ["10", "20"]


def start(code, *args):
  """Runs code after this file's definitions, in a process of its own."""
  program = "from tests.runs.checkpoint_test import *\n" + textwrap.dedent(code)
  return subprocess.Popen(
    [sys.executable, "-c", program, *map(str, args)],
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )


def test_kill_in_a_save_leaves_the_older_ones(tmp_path):
  # One writer after another is killed at a random moment of its saves; the
  # next goes on from what is left.
  code = """
      with checkpoint.Checkpointer(sys.argv[1], 2) as saver:
        restored = saver.restore_latest(abstract(make_items(0)))
        step = restored.step if restored else 0
        if restored:
          assert_equal(restored.items, make_items(step))
        print("from", step, flush=True)
        while True:
          step += 1
          saver.save(step, make_items(step), DATA)
          saver.wait()
          print("saved", step, flush=True)
  """
  generator = random.Random(0)
  done = 0
  for _ in range(3):
    writer = start(code, tmp_path)
    first = writer.stdout.readline().split()
    assert first, writer.communicate()[1]
    assert int(first[1]) >= done  # nothing reported as saved was lost
    for _ in range(2):
      writer.stdout.readline()
    time.sleep(generator.uniform(0, 0.1))
    writer.kill()
    reported = writer.stdout.read()  # what readline left, too
    writer.wait()
    done = max(done + 2, *map(int, re.findall(r"saved (\d+)\n", reported)), 0)
  restored = restore_latest(tmp_path)
  assert restored.step >= done
  assert_equal(restored.items, make_items(restored.step))
  assert not any("corrupt" in name for name in listing(tmp_path))


def peak():
  """The most memory that this process had since `start_peak`, in bytes."""
  status = pathlib.Path("/proc/self/status").read_text()
  return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])


def start_peak():
  """Forgets the peak so far; returns the memory of now, in bytes."""
  pathlib.Path("/proc/self/clear_refs").write_text("5")
  return peak()


def test_saving_takes_no_memory_of_the_state_s_size(tmp_path):
  # In a process of its own, whose peak counts from the save on.
  code = """
      x = jnp.array(np.random.default_rng(0).random(2**24, np.float32))
      with checkpoint.Checkpointer(sys.argv[1], 1) as saver:
        saver.save(0, {"params": {"x": x[:1024]}}, {})  # what Orbax loads
        before = start_peak()
        saver.save(1, {"params": {"x": x}}, {})
      print((peak() - before) / x.nbytes)
  """
  process = start(code, tmp_path)
  output, errors = process.communicate(timeout=300)
  assert float(output or "inf") < 0.25, errors


def test_restoring_takes_no_memory_of_the_state_s_size(tmp_path, monkeypatch):
  # Not even of one array that is all of it. Blocks of 32 MiB are the least
  # that a C library surely gives back.
  block, shape = 2**25, (2**16, 2**10)
  monkeypatch.setattr(checkpoint, "CHUNK_BYTES", block)
  x = jnp.ones(shape)
  with checkpoint.Checkpointer(tmp_path, 5) as saver:
    saver.save(0, {"params": {"x": x[:8]}}, {})
    saver.save(1, {"params": {"x": x}}, {})
  code = """
      array_reader.BLOCK_BYTES = array_reader.AHEAD_BYTES = int(sys.argv[2])

      def read(step, shape):
        target = jax.ShapeDtypeStruct(shape, jnp.float32)
        items = {"params": {"x": target}}
        return checkpoint.restore(sys.argv[1], items, step).items

      read(0, (8, 2**10))  # what this loads and compiles
      before = start_peak()
      x = read(1, (2**16, 2**10))["params"]["x"]
      assert x.min() == 1
      print((peak() - before) / x.nbytes)
  """
  process = start(code, tmp_path, block)
  output, errors = process.communicate(timeout=300)
  # In turn: 256 MiB, and some blocks that are read, put and copied.
  assert float(output or "inf") < 1.8, errors


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
  monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 1024)
  table = jnp.arange(math.prod(shape), dtype=jnp.float32).reshape(shape)
  items = {"params": {"table": table}}
  with checkpoint.Checkpointer(tmp_path, 5) as saver:
    saver.save(1, items, {})
  assert stored_chunk(tmp_path, 1) == chunk
  assert_equal(checkpoint.restore(tmp_path, abstract(items)).items, items)
  # Pieces are no files of their own.
  assert len(list(tmp_path.glob("checkpoints/1/params/**/d/*"))) <= 2


def test_all_processes_share_one_checkpoint(tmp_path):
  code = """
      workdir, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
      jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
      mesh = jax.make_mesh((2,), ("data",), axis_types=(
          jax.sharding.AxisType.Auto,))
      sharding = NamedSharding(mesh, P("data"))
      full = np.arange(8.0, dtype=np.float32)
      x = jax.make_array_from_callback((8,), sharding, lambda i: full[i])
      items = {"params": {"x": x}}
      with checkpoint.Checkpointer(workdir, 5) as saver:
        for step in (1, 2):
          saver.save(step, items, {f"lane{index}": "z" * (1 + 40 * index)})
        saver.wait()
        jax.experimental.multihost_utils.sync_global_devices("saved")
        if index == 0:
          flip_bit(pathlib.Path(workdir, "checkpoints/2"))
        restored = saver.restore_latest(items)
      assert restored.step == 1, restored
      assert restored.data == {"lane0": "z", "lane1": "z" * 41}, restored.data
      local = restored.items["params"]["x"].addressable_data(0)
      assert np.array_equal(local, full[4 * index:4 * index + 4])
      assert checkpoint.restore(workdir, items, "newest").step == 1
  """
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  workers = [start(code, tmp_path, port, index) for index in (0, 1)]
  for worker in workers:
    _, errors = worker.communicate(timeout=300)
    assert worker.returncode == 0, errors[-3000:]
  assert listing(tmp_path) == ["1", "corrupt-2"]
  single = checkpoint.restore(
    tmp_path, {"params": {"x": jax.ShapeDtypeStruct((8,), jnp.float32)}}
  )
  assert np.array_equal(single.items["params"]["x"], np.arange(8.0))
