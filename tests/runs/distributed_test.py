"""The processes of a run: who joins, and what they check together."""

import socket

import jax
import pytest

from ultramem_jax import testing
from ultramem_jax.runs import distributed


@pytest.mark.parametrize(
  "environment",
  [
    # A shell within a job of eight; a step of one process within it.
    {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},
    {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},
    {"OMPI_COMM_WORLD_SIZE": "1"},
    {"TPU_WORKER_HOSTNAMES": "localhost"},
  ],
)
def test_a_process_that_is_alone_joins_nobody(environment, monkeypatch):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  before = jax.config.jax_enable_preemption_service
  try:
    distributed.initialize()
  finally:
    jax.config.update("jax_enable_preemption_service", before)
  assert not jax.distributed.is_initialized()


def test_processes_with_other_settings_end_together(tmp_path):
  """Both are told which of them differ, before anything is computed."""
  (tmp_path / "text.txt").write_text("a line of text\n" * 200)
  program = """if True:
      import sys
      from ultramem_jax import testing
      from ultramem_jax.runs import distributed
      from ultramem_jax.tools import training

      port, index, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
      distributed.initialize(f"localhost:{port}", 2, index)
      config = testing.small_config(
        seed=index, data__source="text", data__path=f"{folder}/text.txt"
      )
      with distributed.ending_at_once():
        distributed.require_same("something", "the same")
        training.open_corpus(config, f"{folder}/run")
  """
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  processes = [
    testing.start(["-c", program, port, i, tmp_path]) for i in range(2)
  ]
  expected = "config or corpus: processes [1] were given other values"
  for status, _, errors in map(testing.finish, processes):
    assert status == 1
    assert f"ConfigError: {expected}" in errors
