"""The command prints what tools/accounting and tools/fit compute."""

import json

import jax

from configs import tiny
from ultramem_jax import testing
from ultramem_jax.settings.config import parse
from ultramem_jax.tools import fit

FLAGS = ["--config=tiny", "--config.model.memory.kind=none"]


def run(*arguments):
  command = ["-m", "ultramem_jax", "accounting", *FLAGS, *arguments]
  status, output, errors = testing.finish(testing.start(command))
  assert status == 0, errors
  return output


def test_json():
  costs = json.loads(run("--json", "--batch=64", "--memory=0.01"))
  assert costs["params"]["sparse"] == 0
  assert costs["memory_access"] == {"64": 4 * 2 * 128 * 512}
  assert costs["available_bytes"] == int(0.01 * fit.GIB)
  assert costs["training_bytes"]["total"] > costs["available_bytes"]
  assert costs["fits"] is False


def test_this_machine_is_asked_as_training_asks_it():
  c = tiny.get_config()
  c.model.memory.kind = "none"
  need = fit.training_bytes(parse(c), 1, jax.devices()[0].platform)
  assert json.loads(run("--json"))["training_bytes"] == need
  # A CPU needs other room than the device that --memory is about.
  of_other = json.loads(run("--json", "--memory=80"))["training_bytes"]
  assert (of_other == need) == (jax.default_backend() != "cpu")


def test_tables_end_with_the_verdict():
  lines = run("--memory=80").splitlines()
  assert lines[0] == "parameters"
  assert lines[-1].startswith("  fits 80 GiB: yes, needs 0.")
