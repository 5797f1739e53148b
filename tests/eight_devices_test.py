"""Runs the tests of eight_devices/, in one process of 8 CPU devices.

By hand: XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python -m pytest tests/eight_devices/FILE
"""

import os

from ultramem_jax import testing

FOLDER = testing.ROOT / "tests" / "eight_devices"
FLAGS = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=8"


def test_on_eight_devices():
  files = sorted(FOLDER.glob("*_checks.py"))
  assert files
  status, output, errors = testing.finish(
    testing.start(["-m", "pytest", *files], XLA_FLAGS=FLAGS)
  )
  assert status == 0, output[-6000:] + errors[-2000:]
