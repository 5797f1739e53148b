"""The log of a run: its records and its speed."""

import json

import pytest

from ultramem_jax import testing
from ultramem_jax.runs import log as log_lib
from ultramem_jax.runs import step_reader

CONFIG = testing.small_config(steps=9)
TOKENS = CONFIG.batch_size * CONFIG.data.seq_len


class Clock:
  """A clock that a test sets."""

  def __init__(self):
    self.now = 100.0

  def monotonic(self):
    return self.now


@pytest.fixture
def clock(monkeypatch):
  made = Clock()
  monkeypatch.setattr(log_lib, "time", made)
  return made


def records(workdir, name):
  lines = (workdir / f"{name}.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def test_speed_counts_the_steps_since_the_last_record(clock, tmp_path):
  """The time of what happens before a restart of the clock does not count."""
  with log_lib.RunLog(tmp_path, CONFIG, None) as log:
    clock.now += 4
    log.record_step(2, {"loss": 3.0})
    clock.now += 1
    log.record_step(4, {"loss": 2.0})
    clock.now += 50
    log.restart_clock(5)
    clock.now += 3
    log.record_step(6, {"loss": 1.0})
  assert records(tmp_path, "metrics") == [
    {"step": 2, "loss": 3.0},
    {"step": 4, "loss": 2.0},
    {"step": 6, "loss": 1.0},
  ]
  assert records(tmp_path, "timing") == [
    {"step": n, "tokens_per_second": TOKENS / s, "step_seconds": s}
    for n, s in ((2, 2.0), (4, 0.5), (6, 3.0))
  ]


def test_results_of_a_validation_are_recorded_and_shown(tmp_path, capsys):
  results = {"loss": 2.5, "perplexity": 12.1825, "bits_per_byte": 3.6067}
  with log_lib.RunLog(tmp_path, CONFIG, None) as log:
    log.record_validation(9, results)
  assert records(tmp_path, "metrics") == [
    {"step": 9, **{f"valid/{name}": value for name, value in results.items()}}
  ]
  assert capsys.readouterr().err == (
    "step 9: validation loss 2.5000, perplexity 12.182, 3.6067 bits per byte\n"
  )


def restored(step, validation_due=False):
  return step_reader.Restored(step, {}, {}, None, validation_due)


def test_a_run_that_goes_on_drops_the_records_after_its_checkpoint(
  tmp_path, capsys
):
  with log_lib.RunLog(tmp_path, CONFIG, None) as log:
    for n in (2, 4, 6):
      log.record_step(n, {"loss": 1.0})
  capsys.readouterr()
  with log_lib.RunLog(tmp_path, CONFIG, restored(4)) as log:
    pass
  assert [r["step"] for r in records(tmp_path, "metrics")] == [2, 4]
  assert "resuming from the checkpoint of step 4" in capsys.readouterr().err
