"""Compiling ahead of time, for devices that are not here."""

import importlib.util
import json
import re

import pytest

from ultramem_jax import testing
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.tools import accounting, topology

HAS_LIBTPU = importlib.util.find_spec("libtpu") is not None
HAS_GPU_PLUGIN = importlib.util.find_spec("jax_cuda12_plugin") is not None
needs_libtpu = pytest.mark.skipif(
  not HAS_LIBTPU, reason="libtpu is missing: pip install -e '.[tpu-compile]'"
)

CONFIG = [
  "--config=configs/tiny.py",
  *testing.flags(testing.MODEL),
  *testing.flags({"batch_size": 8, "data.seq_len": 8}),
]


def run(cache, *arguments):
  """Runs the command: (exit status, stdout, stderr)."""
  command = ["-m", "ultramem_jax", "compile", *CONFIG, *arguments]
  return testing.finish(testing.start(command, cache))


def test_programs_for_simulated_devices(tmp_path):
  """Data parallel: each device adds up the gradients of all parameters."""
  status, output, errors = run(
    tmp_path,
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


def test_a_batch_that_does_not_divide_is_told_in_one_line(tmp_path):
  status, output, errors = run(tmp_path, "--topology=cpu:3")
  assert status == 2 and not output
  assert errors.startswith("error: batch_size = 8: "), errors
  assert errors.count("\n") == 1


@pytest.mark.parametrize(
  "name, expected",
  [
    ("v9:2x2", "topology = 'v9:2x2': must be like v5e:16x16, h100:8, cpu:8 or"),
    ("h100", "topology = 'h100': must be like"),
    ("h100:1x2x4", "topology = 'h100:1x2x4': must be like"),
    ("v5e", "topology = 'v5e': must be like"),
    ("v4:4x4", "topology = 'v4:4x4': v4 takes 3 sides, such as v4:4x4x4"),
    ("v5e:4x0", "topology = 'v5e:4x0': must be like"),
    ("cpu:0", "topology = 'cpu:0': must be like"),
    ("cpu:many", "topology = 'cpu:many': must be like"),
  ],
)
def test_bad_topologies_are_refused(name, expected):
  with pytest.raises(ConfigError, match=re.escape(expected)):
    topology.devices(name)


@pytest.mark.skipif(HAS_LIBTPU, reason="libtpu is installed")
def test_without_libtpu_it_says_how_to_install_it():
  with pytest.raises(ConfigError, match=r"needs libtpu.*pip install"):
    topology.devices("v5e:2x2")


@pytest.mark.skipif(HAS_GPU_PLUGIN, reason="jax_cuda12_plugin is installed")
def test_without_the_gpu_plugin_it_says_how_to_install_it():
  with pytest.raises(ConfigError, match=r"needs JAX's plugin.*pip install"):
    topology.devices("h100:8")


@needs_libtpu
def test_a_tpu_layout_that_cannot_be_is_refused():
  with pytest.raises(ConfigError, match=r"v5e:3x3.*not divis"):
    topology.devices("v5e:3x3")
  assert len(topology.devices("v5e:2x4")) == 8
  assert len(topology.devices("v5e:1x1")) == 1
  assert len(topology.devices("v4:2x2x1")) == 4  # chips, not their cores


@needs_libtpu
def test_the_steps_compile_for_a_tpu(tmp_path):
  status, output, errors = run(tmp_path, "--topology=v5e:2x2", "--batch=8")
  assert status == 0, errors
  train, decode = output.split("decode step for v5e:2x2, 4 devices")
  assert train.startswith("train step for v5e:2x2, 4 devices")
  for text in (train, decode):
    assert "fits 15.75 GiB: yes, needs " in text
  assert "all-reduce of 4" in train
