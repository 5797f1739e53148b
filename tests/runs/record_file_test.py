"""Logs under attack: strange lines, gaps, full disks."""

import errno
import json
import os

import pytest

from ultramem_jax import testing
from ultramem_jax.runs import log as log_lib
from ultramem_jax.runs import metrics, record_file, step_reader

CONFIG = testing.small_config(steps=20, log_every=2, eval_every=10)


def restored(step, validation_due=False):
  return step_reader.Restored(step, {}, {}, None, validation_due)


def steps(workdir):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line)["step"] for line in lines]


@pytest.fixture
def workdir(tmp_path):
  """The logs of a run up to step 10, with its validation."""
  with log_lib.RunLog(tmp_path, CONFIG, None) as log:
    for n in range(2, 11, 2):
      log.record_step(n, {"loss": 1.0})
    log.record_validation(
      10, {"loss": 0.5, "perplexity": 1.6, "bits_per_byte": 0.7}
    )
  return tmp_path


def go_on(workdir, *arguments):
  with log_lib.RunLog(workdir, CONFIG, restored(*arguments)):
    pass


@pytest.mark.parametrize(
  "line",
  [
    b"null",
    b"[1]",
    b'"step"',
    b"{}",
    b'{"step": null}',
    b'{"step": "3"}',
    b'{"step": 2.0}',
    b'{"step": true}',
    b'{"loss": 1.0}',
    b"\0\0\0\0",
    b"\xff\xfe",
    100_000 * b"[",
  ],
)
def test_lines_that_are_no_records_are_told_and_dropped(workdir, caplog, line):
  path = workdir / "metrics.jsonl"
  path.write_bytes(line + b"\n" + path.read_bytes())
  go_on(workdir, 10)
  assert steps(workdir) == [2, 4, 6, 8, 10, 10]
  (message,) = [r.getMessage() for r in caplog.records]
  assert message == f"{path}: dropped 1 lines that are not records"


@pytest.mark.parametrize(
  ("lines", "lost"),
  [
    (slice(0, 3), ["'loss' of 2 steps, 8 to 10", "'valid/loss' of 1 steps"]),
    (slice(2, 6), ["'loss' of 2 steps, 2 to 4"]),
    (slice(0, 0), ["'loss' of 5 steps, 2 to 10", "'valid/loss' of 1 steps"]),
    (slice(0, 5), ["'valid/loss' of 1 steps, 10 to 10"]),
    (slice(0, 6), []),
  ],
)
def test_records_that_are_lost_are_told(workdir, caplog, lines, lost):
  path = workdir / "metrics.jsonl"
  path.write_bytes(b"".join(path.read_bytes().splitlines(True)[lines]))
  go_on(workdir, 10)
  told = [r.getMessage() for r in caplog.records]
  assert len(told) == len(lost)
  for message, part in zip(told, lost, strict=True):
    assert f"the logs of {workdir} have lost {part}" in message


def test_a_log_that_is_gone_is_told(workdir, caplog):
  os.remove(workdir / "metrics.jsonl")
  go_on(workdir, 10)
  assert "have lost 'loss' of 5 steps, 2 to 10" in caplog.text


def test_a_validation_that_was_stopped_is_recorded_once(workdir, caplog):
  """A kill after its record leaves one that the next start writes again."""
  go_on(workdir, 10, True)
  assert steps(workdir) == [2, 4, 6, 8, 10]
  assert not caplog.records


class Full:
  """A disk that takes some bytes and then no more."""

  def __init__(self, monkeypatch):
    self.room, self._write = 10**9, os.write
    monkeypatch.setattr(record_file.os, "write", self)

  def __call__(self, file, data):
    if not self.room:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written = self._write(file, bytes(data)[: self.room])
    self.room -= written
    return written


def test_records_wait_until_the_disk_has_room(tmp_path, monkeypatch, caplog):
  writer = metrics.Writer(tmp_path, None)
  disk = Full(monkeypatch)
  writer.write(1, {"loss": 1.0})
  disk.room = 5  # in the middle of a line
  for n in (2, 3):
    writer.write(n, {"loss": 1.0})
  writer.sync()
  assert steps(tmp_path) == [1]
  assert (tmp_path / "metrics.jsonl").read_bytes().endswith(b"}\n")
  disk.room = 10**9
  writer.write(4, {"loss": 1.0})
  writer.close()
  assert steps(tmp_path) == [1, 2, 3, 4]
  (message,) = [r.getMessage() for r in caplog.records]  # once
  assert "metrics.jsonl cannot be written now: [Errno 28]" in message


def test_records_that_found_no_room_are_told(tmp_path, monkeypatch, caplog):
  writer = metrics.Writer(tmp_path, None)
  disk = Full(monkeypatch)
  disk.room = 0
  for n in (1, 2):
    writer.write(n, {"loss": 1.0})
  writer.close()
  assert caplog.records[-1].getMessage().endswith("2 records are lost")
  go_on(tmp_path, 2)
  assert "have lost 'loss' of 1 steps, 2 to 2" in caplog.text


@pytest.mark.parametrize("trouble", ["file", "link", "full"])
def test_a_run_does_without_tensorboard(tmp_path, caplog, trouble):
  """As where its folder cannot be made, or its disk is full."""
  board = tmp_path / "tensorboard"
  if trouble == "file":
    board.write_text("")
  elif trouble == "link":
    board.symlink_to(tmp_path / "absent" / "folder")
  writer = metrics.Writer(tmp_path, None)
  if trouble == "full":
    (path,) = board.iterdir()
    os.remove(path)
    # What the file's buffer is written to when it is full.
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._board._file._py_recordio_writer._writer.fileno())
    os.close(full)
  # More than its buffer, and any queue, holds.
  for n in range(1, 101):
    writer.write(n, {f"value_{i}": 0.5 for i in range(20)})
  writer.close()
  assert steps(tmp_path) == list(range(1, 101))
  told = [r.getMessage() for r in caplog.records]
  assert len(told) == 1 and "nothing more is written for TensorBoard" in told[0]
