"""Memory of the host: what is freed stays with the process."""

import ctypes
import os
import platform

# Parameters of mallopt(3): the most arenas, the most areas that are mapped
# apart, and the free bytes that are kept at the end of the heap.
M_ARENA_MAX, M_MMAP_MAX, M_TRIM_THRESHOLD = -8, -4, -1


def keep_freed() -> None:
  """Makes glibc's malloc keep freed memory for the next allocation.

  On a CPU every step allocates its temporaries, hundreds of MB, and frees them.
  By default glibc returns them to the kernel, and each step pays a page fault
  for every 4 KB again.

  To be called before threads begin. Does nothing without glibc, or where
  environment variables set malloc up otherwise.
  """
  chosen = any(
    name == "GLIBC_TUNABLES" or name.startswith("MALLOC_")
    for name in os.environ
  )
  if chosen or platform.libc_ver()[0] != "glibc":
    return
  libc = ctypes.CDLL(None)
  libc.mallopt(M_ARENA_MAX, 1)
  libc.mallopt(M_MMAP_MAX, 0)
  libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
