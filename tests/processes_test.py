"""Runs of two processes, four devices each, that talk over the loopback."""

import json
import random
import signal
import socket
import time

import jax
import pytest

from ultramem_jax import testing
from ultramem_jax.runs import checkpoint
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.testing import assert_close
from ultramem_jax.train import state as state_lib

# One table, which the devices of both processes share.
SETTINGS = {
  **testing.MODEL,
  "model.num_layers": 1,
  "model.memory.spans": "1:1",
  "steps": 5000,
  "batch_size": 8,
  "log_every": 1,
  "eval_every": 10,
  "checkpoint.every": 5,
  "checkpoint.keep": 100,
  "data.seq_len": 8,
  "data.source": "text",
  "mesh.data": 2,
  "mesh.table": 4,
  "mesh.table_axes": "data,table",
  "model.memory.storage.partition": "rows",
  "model.dropout_rate": 0.1,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
  """Starts train.py in a workdir, as one process or as several."""
  folder = tmp_path_factory.mktemp("processes")
  rng = random.Random(0)
  for name, count in (("train", 40), ("valid", 2)):
    for index in range(count):
      text = "".join(rng.choices("abcdef ", k=rng.randint(5, 60)))
      (folder / f"{name}_{index}.txt").write_text(text)
  corpus = {
    "data.path": folder / "train_*.txt",
    "data.valid_path": folder / "valid_*.txt",
  }

  def start(workdir, count=1, slurm=False, overrides=(), flags=()):
    settings = {**SETTINGS, **corpus, **dict(overrides)}

    def start_one(index):
      meeting, environment = [], {}
      if slurm:
        environment = {
          "SLURM_JOB_ID": "1",
          "SLURM_STEP_NODELIST": "localhost",
          "SLURM_NTASKS": str(count),
          "SLURM_STEP_NUM_TASKS": str(count),
          "SLURM_PROCID": str(index),
          "SLURM_LOCALID": str(index),
          "JAX_COORDINATOR_PORT": str(port),
        }
      elif count > 1:
        meeting = [
          f"--coordinator=localhost:{port}",
          f"--num_processes={count}",
          f"--process_id={index}",
        ]
      return testing.start(
        [
          "train.py",
          "--config=configs/tiny.py",
          f"--workdir={workdir}",
          *testing.flags(settings),
          *flags,
          *meeting,
        ],
        JAX_NUM_CPU_DEVICES=str(8 // count),
        **environment,
      )

    return [start_one(index) for index in range(count)]

  # Bound, but not listening: nobody else gets the port, and the coordinator,
  # which shares ports as this does, can listen there.
  with socket.socket() as held:
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("", 0))
    port = held.getsockname()[1]
    yield start


def records(workdir):
  """The lines of metrics.jsonl; a last line without its end is left out."""
  path = workdir / "metrics.jsonl"
  lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
  return [json.loads(line) for line in lines if line.endswith(b"\n")]


def sealed(workdir):
  """Steps whose checkpoints are whole."""
  found = (workdir / "checkpoints").glob("*/sha256.json")
  return sorted(int(path.parent.name) for path in found)


def wait_until(happened, processes):
  """Waits, as long as all processes run."""
  until = time.monotonic() + 300
  while not happened():
    for process in processes:
      assert process.poll() is None, process.communicate()[1][:6000]
    assert time.monotonic() < until
    time.sleep(0.01)


def restore(workdir, saved):
  config = workdir_lib.load_config(workdir)
  state = jax.eval_shape(lambda: state_lib.init_state(config))
  return checkpoint.restore(workdir, state.to_items(), saved)


def test_two_processes_are_killed_go_on_and_equal_one(start, tmp_path):
  workdir = tmp_path / "two"
  # One is killed: the other ends by itself, and not well. Both write a trace.
  processes = start(workdir, 2, flags=["--profile=2:3"])
  wait_until(lambda: sealed(workdir), processes)
  processes[1].kill()
  (status, output, errors), (killed, silent, _) = map(testing.finish, processes)
  assert killed == -signal.SIGKILL and status not in (0, -signal.SIGKILL)
  assert "error: process 1 of 2 is gone, so process 0 ends" in errors
  assert "tables split over 8 devices: rows" in output, errors
  assert silent == ""
  reached = max(sealed(workdir))
  for index in range(2):
    (trace,) = workdir.glob(f"profile/process_{index}/**/*.xplane.pb")
    events = {
      event.name
      for plane in jax.profiler.ProfileData.from_file(str(trace)).planes
      for line in plane.lines
      for event in line.events
    }
    assert "train" in events

  # One is asked to stop, which both do after the same step. What the flags
  # said, the environment of a cluster says.
  processes = start(workdir, 2, slurm=True)
  wait_until(lambda: max(sealed(workdir)) > reached, processes)
  processes[1].send_signal(signal.SIGTERM)
  (status, output, errors), (other, silent, quiet) = map(
    testing.finish, processes
  )
  assert (status, other) == (0, 0), errors + quiet
  assert f"resuming from the checkpoint of step {reached}" in errors
  stopped = max(sealed(workdir))
  assert f"stopped at step {stopped}; run the same command again to" in output
  assert silent == "" and "step" not in quiet

  # One process with all the devices does the same.
  alone = tmp_path / "one"
  compared = reached + 5
  (process,) = start(alone, overrides={"checkpoint.every": compared})
  wait_until(lambda: sealed(alone), [process])
  process.kill()
  testing.finish(process)
  actual, expected = restore(workdir, compared), restore(alone, compared)
  # Every row of the batch has its own place in the data, now as then.
  assert (
    actual.data_state == expected.data_state and len(actual.data_state) == 8
  )
  # Sums over devices are taken in another order.
  assert_close(actual.items, expected.items)
  # One writer: every record once, those of steps that were lost too.
  logs = [
    [record for record in records(folder) if record["step"] <= compared]
    for folder in (workdir, alone)
  ]
  assert [list(record) for record in logs[0]] == [
    list(record) for record in logs[1]
  ]
  assert_close(*logs, tolerance=1e-4)
