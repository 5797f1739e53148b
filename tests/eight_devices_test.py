"""Runs the tests of eight_devices/, each file in a process of 8 CPU devices.

By hand: XLA_FLAGS=--xla_force_host_platform_device_count=8 \
    python -m pytest tests/eight_devices/FILE
"""

import conftest
import pytest
import small

FOLDER = small.ROOT / "tests" / "eight_devices"
FLAGS = " ".join([*conftest.FLAGS, "--xla_force_host_platform_device_count=8"])


@pytest.mark.parametrize(
  "name", sorted(path.name for path in FOLDER.glob("*_checks.py"))
)
def test_on_eight_devices(name, tmp_path):
  status, output, errors = small.finish(
    small.start(
      ["-m", "pytest", "-x", FOLDER / name], tmp_path, XLA_FLAGS=FLAGS
    )
  )
  assert status == 0, output[-6000:] + errors[-2000:]
