"""The peers of benchmarks: torch and ultra-mem, in an environment of their own.

The environment is made when it is missing: its packages, where they are not
installed here, come from PyPI. Our side and the peers' are processes with the
same settings of the allocator.
"""

import pathlib
import subprocess
import sys
import sysconfig
from collections.abc import Sequence

from absl import flags

from benchmarks.harness import report
from benchmarks.harness.worker import Worker

FOLDER = pathlib.Path.home() / ".cache" / "ultramem_jax" / "peers"
PACKAGES = ("torch==2.13.0", "ultra-mem==0.1.2")
# What `ultramem_jax.runs.host_memory` does to glibc in the commands.
KEEP_FREED = {
  "MALLOC_ARENA_MAX": "1",
  "MALLOC_MMAP_MAX_": "0",
  "MALLOC_TRIM_THRESHOLD_": str(2**31 - 1),
}
# glibc then takes memory in huge pages and keeps it, which spares both sides
# most of the page faults of large arrays.
HUGE_PAGES = {
  "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
  "MALLOC_MMAP_THRESHOLD_": str(2**40),
  "MALLOC_TRIM_THRESHOLD_": str(2**40),
}

HUGE = flags.DEFINE_bool("huge_pages", False, "Let both sides use huge pages.")
ENVIRONMENT = flags.DEFINE_string(
  "peers", str(FOLDER), "Virtual environment of the peers."
)


def own_worker(module: str, keep_freed: bool = False) -> Worker:
  """Returns a process of a module of ours.

  Args:
    module: its name.
    keep_freed: what is freed stays with the process, as in train.py.
  """
  return Worker([sys.executable, "-m", module], _settings(keep_freed))


def peer_worker(
  module: str,
  keep_freed: bool = False,
  environment: pathlib.Path | None = None,
  packages: Sequence[str] = PACKAGES,
) -> Worker:
  """Returns a process of a module that runs among the peers, without JAX.

  Args:
    module, keep_freed: as for `own_worker`.
    environment: where it runs; None: that of --peers.
    packages: that are installed there if it is missing.
  """
  python = _python(environment or pathlib.Path(ENVIRONMENT.value), packages)
  return Worker([python, "-m", module], _settings(keep_freed))


def _settings(keep_freed: bool) -> dict[str, str]:
  kept = KEEP_FREED if keep_freed else {}
  pages = HUGE_PAGES if HUGE.value else {}
  return {"PYTHONPATH": str(report.ROOT), **kept, **pages}


def _python(folder: pathlib.Path, packages: Sequence[str]) -> str:
  """Returns the Python of the peers' environment, made if it is missing."""
  python = folder / "bin" / "python"
  if not python.exists():
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    # What is installed here need not be fetched again.
    (site,) = folder.glob("lib/*/site-packages")
    (site / "here.pth").write_text(sysconfig.get_path("purelib") + "\n")
    subprocess.run([python, "-m", "pip", "install", *packages], check=True)
  return str(python)
