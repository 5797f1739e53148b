"""Compiling ahead of time, for devices that need not be here."""

import importlib.util
import json

import pytest

from ultramem_jax import testing
from ultramem_jax.tools import accounting

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
needs_libtpu = pytest.mark.skipif(
  not HAS_LIBTPU, reason="libtpu is missing: pip install -e '.[tpu-compile]'"
)

CONFIG = [
  "--config=configs/tiny.py",
  *testing.flags(testing.MODEL),
  *testing.flags({"batch_size": 8, "data.seq_len": 8}),
]


def run(*arguments):
  """Runs the command: (exit status, stdout, stderr)."""
  command = ["-m", "ultramem_jax", "compile", *CONFIG, *arguments]
  return testing.finish(testing.start(command))


def test_programs_for_simulated_devices(tmp_path):
  """Data parallel: each device adds up the gradients of all parameters."""
  status, output, errors = run(
    "--topology=cpu:4",
    "--batch=8",
    "--cache=16",
    "--json",
    f"--text={tmp_path}/text",
  )
  assert status == 0, errors
  train, decode = map(json.loads, output.splitlines())
  assert (train["step"], decode["step"]) == ("train", "decode")
  bytes_ = 4 * sum(accounting.parameters(testing.small_config().model).values())
  # Parameters and Adam's two moments are arguments, and donated.
  assert 3 * bytes_ < train["bytes"]["arguments"] < 3.2 * bytes_ + 10_000
  assert train["bytes"]["outputs"] < bytes_ / 10
  reduced = train["collectives"]["all-reduce of 4"]["bytes"]
  assert reduced > 2 * 3 / 4 * bytes_
  # Decoding moves a few numbers at most, and nothing of the parameters' size.
  moved = sum(x["bytes"] for x in decode["collectives"].values())
  assert moved < bytes_ / 10
  assert decode["bytes"]["arguments"] < 1.5 * bytes_
  for name in ("train", "decode"):
    assert "HloModule" in (tmp_path / "text" / f"{name}.txt").read_text()


def test_a_batch_that_does_not_divide_is_told_in_one_line():
  status, output, errors = run("--topology=cpu:3")
  assert status == 2 and not output
  assert errors.startswith("error: batch_size = 8: "), errors
  assert errors.count("\n") == 1


def test_a_batch_that_cannot_decode_is_told_before_training_is_compiled():
  status, output, errors = run("--topology=cpu:4", "--batch=3")
  assert status == 2 and not output
  assert errors.startswith("error: batch = 3: must be divisible by the 4")


@needs_libtpu
def test_the_steps_compile_for_a_tpu():
  status, output, errors = run("--topology=v5e:2x2", "--batch=8")
  assert status == 0, errors
  train, decode = output.split("decode step for v5e:2x2, 4 devices")
  assert train.startswith("train step for v5e:2x2, 4 devices")
  for text in (train, decode):
    assert "fits 15.75 GiB: yes, needs " in text
  assert "all-reduce of 4" in train
