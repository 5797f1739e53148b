"""What a program can have of this machine, of its group, and of others."""

import jax

from ultramem_jax.tools import device_memory


def test_available_bytes_of_this_machine():
  available = device_memory.available_bytes()
  if available is None:  # of some accelerators
    assert jax.default_backend() != "cpu"
  else:
    assert 2**20 < available < 2**50


def test_control_group_and_free_memory_limit_the_host(tmp_path):
  meminfo = tmp_path / "proc/meminfo"
  version_1 = tmp_path / "sys/fs/cgroup/memory/memory.limit_in_bytes"
  version_2 = tmp_path / "sys/fs/cgroup/memory.max"
  for path in (meminfo, version_1):
    path.parent.mkdir(parents=True)
  assert device_memory.host_bytes(tmp_path) > 2**20  # physical memory
  meminfo.write_text("MemTotal: 9 kB\nMemAvailable:   4000 kB\n")
  assert device_memory.host_bytes(tmp_path) == 4000 * 1024
  version_2.write_text("max\n")
  assert device_memory.host_bytes(tmp_path) == 4000 * 1024
  version_2.write_text("3000000\n")
  assert device_memory.host_bytes(tmp_path) == 3_000_000
  # What the group has taken is gone, but for files that it would give up.
  version_2.with_name("memory.current").write_text("1200000\n")
  assert device_memory.host_bytes(tmp_path) == 1_800_000
  stat = "anon 700000\ninactive_file 500000\nactive_file 9\n"
  version_2.with_name("memory.stat").write_text(stat)
  assert device_memory.host_bytes(tmp_path) == 2_300_000
  version_1.write_text("2000000\n")
  assert device_memory.host_bytes(tmp_path) == 2_000_000
  version_1.with_name("memory.usage_in_bytes").write_text("2500000\n")
  assert device_memory.host_bytes(tmp_path) == 0


def test_memory_of_devices_that_are_not_here():
  class Device:
    platform, device_kind = "tpu", "TPU v5 lite"

  assert device_memory.available_bytes(Device()) == 15.75 * device_memory.GIB
  Device.device_kind = "TPU v99"
  assert device_memory.available_bytes(Device()) is None
