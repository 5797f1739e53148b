"""The memory that a program can have of a device."""

import os
import pathlib
import re
from typing import Any

import jax

from ultramem_jax.runs import distributed

GIB = 2**30
CGROUP1_CACHE = "total_inactive_file"  # of control groups of version 1

GPU_FRACTION = float(os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", 0.75))
# Memory of one device that a program can have, by its kind. TPUs: what
# libtpu names when a program needs more (nominally 8, 16, 32, 16, 95, 32 and
# 96 GiB). A v2, v3 or tpu7x chip is two devices. GPUs: the part that
# JAX takes of them.
MEMORY_BYTES = {
  "NVIDIA H100 80GB HBM3": int(79.1 * GIB * GPU_FRACTION),
  "TPU v2": int(7.48 * GIB),
  "TPU v3": int(15.48 * GIB),
  "TPU v4": int(30.75 * GIB),
  "TPU v5 lite": int(15.75 * GIB),
  "TPU v5": int(95.74 * GIB),
  "TPU v6 lite": int(31.25 * GIB),
  "TPU7x": int(94.75 * GIB),
}


def host_bytes(root: str = "/") -> int | None:
  """Returns the bytes that this process may still take; None: unknown.

  They are the least of what Linux calls available and what the control group
  has left of its limit; elsewhere (macOS) the physical memory.
  """
  limits = []
  meminfo = pathlib.Path(root, "proc/meminfo")
  if meminfo.exists():
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())
    limits += [1024 * int(found[1])] if found else []
  elif {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(os.sysconf_names):
    limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
  groups = pathlib.Path(root, "sys/fs/cgroup")
  limits += [
    left
    for folder, limit, usage, cache in (
      (groups, "max", "current", "inactive_file"),  # cgroup 2
      (groups / "memory", "limit_in_bytes", "usage_in_bytes", CGROUP1_CACHE),
    )
    if (left := _group_bytes(folder, limit, usage, cache)) is not None
  ]
  return min(limits, default=None)


def _group_bytes(
  folder: pathlib.Path, limit: str, usage: str, cache: str
) -> int | None:
  """Returns what a control group has left; None: it has no limit.

  Args:
    folder: of its files.
    limit, usage: names of files, after "memory.".
    cache: what of the usage is files in the cache, which make room; a key of
      the file memory.stat.
  """
  limit, usage, stat = (
    path.read_text() if (path := folder / f"memory.{x}").exists() else ""
    for x in (limit, usage, "stat")
  )
  if not limit.strip().isdecimal():
    return None
  cached = re.search(rf"^{cache} (\d+)$", stat, re.MULTILINE)
  used = int(usage or 0) - int(cached[1] if cached else 0)
  return max(0, int(limit) - max(0, used))


def available_bytes(
  device: jax.Device | None = None,  # pyright: ignore[reportInvalidTypeForm]
) -> int | None:
  """Returns the bytes that a program can have of a device; None: unknown.

  The devices of a CPU share what the machine and the control group still give.

  Args:
    device: in this machine or not, such as those of `topology.devices`. By
      default the first one here.
  """
  here = [x for x in distributed.devices() if x in jax.local_devices()]
  asked: Any = here[0] if device is None else device
  if asked.platform == "cpu":
    available = host_bytes()
    return available and available // len(here)
  stats = asked.memory_stats() if asked in here else None
  return (stats or {}).get("bytes_limit", MEMORY_BYTES.get(asked.device_kind))
