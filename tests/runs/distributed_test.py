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


def test_processes_with_other_values_end_together():
  """Both are told which of them differ, before anything is computed."""
  program = """if True:
      import sys
      from ultramem_jax.runs import distributed

      port, index = sys.argv[1], int(sys.argv[2])
      distributed.initialize(f"localhost:{port}", 2, index)
      with distributed.ending_at_once():
        distributed.require_same("config", "a config")
        distributed.require_same("corpus", f"corpus {index}")
  """
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    port = probe.getsockname()[1]
  processes = [testing.start(["-c", program, port, i]) for i in range(2)]
  for status, _, errors in map(testing.finish, processes):
    assert status == 1
    assert "ConfigError: corpus: processes [1] were given other values" in (
      errors
    )
