"""Tests of the logs, with real files and real kills."""

import json
import os
import pathlib
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from ultramem_jax.runs import metrics


def records(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def events(workdir):
  """All TensorBoard events: files by age, each record framed by lengths."""
  for path in sorted(
    (workdir / "tensorboard").iterdir(),
    key=lambda path: path.stat().st_mtime_ns,
  ):
    content = path.read_bytes()
    while content:
      (length,) = struct.unpack("<Q", content[:8])
      yield event_pb2.Event.FromString(content[12 : 12 + length])
      content = content[12 + length + 4 :]


def write_steps(writer, steps):
  for step in steps:
    writer.write(step, {"loss": np.float32(1 / step)})
    if step % 4 == 0:  # the validation's record, at the same step
      writer.write(step, {"valid_loss": np.float32(2 / step)})
    writer.write_timing(step, {"tokens_per_second": 1.5})


def test_values_read_back_exactly(tmp_path):
  writer = metrics.Writer(tmp_path, None)
  values = {
    "f32": np.float32(0.1),
    "jax": jnp.float32(1e-38),
    "f64": 0.1,
    "half": jnp.bfloat16(0.3),
    "int": np.int32(7),
    "big": 2**60,
    "flag": np.bool_(True),
    "list": jnp.asarray([0.1, jnp.inf]),
    "nan": np.float32("nan"),
    "low": -np.inf,
    "text": "def é",
  }
  writer.write(3, values)
  writer.close()
  line = (tmp_path / "metrics.jsonl").read_text()
  [record] = records(tmp_path / "metrics.jsonl")
  assert "NaN," not in line.replace('"NaN"', "")
  assert list(record) == ["step", *values]
  assert np.float32(record["f32"]) == np.float32(0.1)
  assert record["f32"] == float(np.float32(0.1)) != 0.1
  assert np.float32(record["jax"]).tobytes() == np.float32(1e-38).tobytes()
  assert record["f64"] == 0.1
  assert jnp.bfloat16(record["half"]) == jnp.bfloat16(0.3)
  assert (record["int"], record["big"], record["flag"]) == (7, 2**60, True)
  assert record["list"] == [float(np.float32(0.1)), "Infinity"]
  assert (record["nan"], record["low"]) == ("NaN", "-Infinity")
  assert float(record["low"]) == -np.inf
  assert record["text"] == "def é"


@pytest.mark.parametrize("cut", [0, 1, 5, 40])
def test_resumed_log_equals_the_unbroken_one(tmp_path, cut):
  for name in ("whole", "broken"):
    (tmp_path / name).mkdir()
  whole = metrics.Writer(tmp_path / "whole", None)
  write_steps(whole, range(1, 13))
  whole.close()
  broken = metrics.Writer(tmp_path / "broken", None)
  write_steps(broken, range(1, 11))
  broken.close()
  log = tmp_path / "broken" / "metrics.jsonl"
  os.truncate(log, log.stat().st_size - cut)
  resumed = metrics.Writer(tmp_path / "broken", 8)  # the last checkpoint
  # Both records of step 8 stay: they were on the disk before its checkpoint.
  assert [r["step"] for r in records(log)] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
  assert [r["step"] for r in records(log.with_name("timing.jsonl"))][-1] == 8
  write_steps(resumed, range(9, 13))
  resumed.close()
  for name in ("metrics.jsonl", "timing.jsonl"):
    assert (tmp_path / "broken" / name).read_bytes() == (
      tmp_path / "whole" / name
    ).read_bytes()


def test_fresh_start_drops_everything(tmp_path):
  first = metrics.Writer(tmp_path, None)
  first.write(0, {"valid_loss": 5.0})
  first.close()
  second = metrics.Writer(tmp_path, None)
  second.write(0, {"valid_loss": 4.0})
  second.close()
  assert records(tmp_path / "metrics.jsonl") == [{"step": 0, "valid_loss": 4.0}]


def test_last_line_without_its_end_is_torn(tmp_path):
  (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n{"step": 2}')
  metrics.Writer(tmp_path, 2).close()
  assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'


def test_records_outlive_a_kill(tmp_path):
  code = """
import os, signal, sys
from ultramem_jax.runs import metrics
writer = metrics.Writer(sys.argv[1], None)
for step in range(1, 6):
  writer.write(step, {"loss": 1.0})
  writer.write_timing(step, {"elapsed": 1.0})
os.kill(os.getpid(), signal.SIGKILL)
"""
  process = subprocess.run(
    [sys.executable, "-c", code, str(tmp_path)],
    timeout=300,
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  assert process.returncode == -9
  for name in ("metrics.jsonl", "timing.jsonl"):
    assert [r["step"] for r in records(tmp_path / name)] == [1, 2, 3, 4, 5]


def test_tensorboard_gets_the_scalars_and_the_purge(tmp_path):
  writer = metrics.Writer(tmp_path, None)
  writer.write(1, {"loss": np.float32(0.5), "text": "x", "list": [1, 2]})
  writer.write_timing(2, {"elapsed": 2.0})
  writer.close()
  metrics.Writer(tmp_path, 1).close()
  assert len(list((tmp_path / "tensorboard").iterdir())) == 2
  scalars = [
    (event.step, value.tag, value.simple_value)
    for event in events(tmp_path)
    for value in event.summary.value
  ]
  assert scalars == [(1, "loss", 0.5), (2, "elapsed", 2.0)]
  starts = [
    event.step
    for event in events(tmp_path)
    if event.session_log.status == event.session_log.START
  ]
  assert starts == [0, 2]


def test_only_process_0_writes(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.jax, "process_index", lambda: 1)
  writer = metrics.Writer(tmp_path / "run", None)
  write_steps(writer, range(1, 5))
  writer.sync()
  writer.close()
  assert not (tmp_path / "run").exists()


def test_a_workdir_that_was_renamed_is_not_made_anew(tmp_path):
  with pytest.raises(FileNotFoundError):
    metrics.Writer(tmp_path / "run", None)
  assert not (tmp_path / "run").exists()
