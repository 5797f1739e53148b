"""Freed memory stays with the process."""

import platform

import pytest

from ultramem_jax import testing

PAGES = 20 * 1024
# Takes and frees 80 MB five times; prints the page faults of the last four.
SCRIPT = f"""
import resource, runpy

runpy.run_path("ultramem_jax/runs/host_memory.py")["keep_freed"]()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
(b"1" * {PAGES}) * 4096
before = faults()
for _ in range(4):
  (b"1" * {PAGES}) * 4096
print(faults() - before)
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="a setting of glibc's malloc"
)
@pytest.mark.parametrize(
  "variables, kept",
  [({}, True), ({"MALLOC_TRIM_THRESHOLD_": str(128 * 1024)}, False)],
  ids=["by itself", "as the user says"],
)
def test_freed_memory_is_kept(variables, kept):
  status, output, errors = testing.finish(
    testing.start(["-c", SCRIPT], **variables)
  )
  assert status == 0, errors
  assert int(output) < PAGES / 10 if kept else int(output) > 3 * PAGES
