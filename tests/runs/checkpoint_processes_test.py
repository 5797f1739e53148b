"""Checkpoints of other processes: real kills, their memory, and one of two."""

import random
import re
import socket
import time

import jax
import jax.numpy as jnp
import numpy as np

from tests.runs.saved_steps import (
  assert_equal,
  listing,
  make_items,
  restore_latest,
  start,
)
from ultramem_jax.runs import checkpoint, step_writer


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
  monkeypatch.setattr(step_writer, "CHUNK_BYTES", block)
  x = jnp.ones(shape)
  with checkpoint.Checkpointer(tmp_path, 5) as saver:
    saver.save(0, {"params": {"x": x[:8]}}, {})
    saver.save(1, {"params": {"x": x}}, {})
  code = """
      from ultramem_jax.runs import array_reader

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


def test_processes_that_do_not_share_the_workdir_are_named(tmp_path):
  code = """
      from ultramem_jax.runs import distributed
      from ultramem_jax.settings.errors import CheckpointError

      workdir, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
      jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
      distributed.SEEN_SECONDS = 1
      try:
        checkpoint.Checkpointer(f"{workdir}/{index}", 1)
      except CheckpointError as error:
        print(error)
  """
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  for worker in [start(code, tmp_path, port, index) for index in (0, 1)]:
    output, errors = worker.communicate(timeout=120)
    assert "processes [1] do not see what process 0 writes" in output, errors
  assert not any((tmp_path / "0" / "checkpoints").iterdir())


def test_all_processes_share_one_checkpoint(tmp_path):
  code = """
      from jax.experimental import multihost_utils
      from jax.sharding import AxisType, NamedSharding, PartitionSpec

      workdir, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
      jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
      mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
      sharding = NamedSharding(mesh, PartitionSpec("data"))
      full = np.arange(8.0, dtype=np.float32)
      x = jax.make_array_from_callback((8,), sharding, lambda i: full[i])
      items = {"params": {"x": x}}
      with checkpoint.Checkpointer(workdir, 5) as saver:
        for step in (1, 2):
          saver.save(step, items, {f"lane{index}": "z" * (1 + 40 * index)})
        saver.wait()
        multihost_utils.sync_global_devices("saved")
        if index == 0:
          flip_bit(pathlib.Path(workdir, "checkpoints/2"))
        restored = saver.restore_latest(items)
      assert restored.step == 1, restored
      state = restored.data_state
      assert state == {"lane0": "z", "lane1": "z" * 41}, state
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
