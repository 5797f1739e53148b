"""What XLA compiled for one command, kept for the next.

JAX keeps compiled programs in a folder if it is told to. The commands of this
package tell it; the library does not. Several processes may share the folder.
"""

import contextlib
import os
import pathlib
import secrets
import warnings

import jax
import zstandard
from absl import logging

# What the default folder may hold when a command starts.
MAX_BYTES = 2**30

_ENTRIES = "*-cache"
_COMPILED = "/jax/core/compile/backend_compile_duration"


def default_folder() -> pathlib.Path:
  """Returns ~/.cache/ultramem_jax/xla, or the same in XDG_CACHE_HOME."""
  caches = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(caches, "ultramem_jax", "xla")


def use(folder: str | None = None) -> None:
  """Keeps the programs that this process compiles, and takes those kept.

  If a folder cannot be made, one line says so, and nothing is kept. An entry
  that is damaged, or that another process is writing, is compiled again.

  Args:
    folder: made if absent; "": nothing is kept; None: that of the environment's
      JAX_COMPILATION_CACHE_DIR or else the default, kept below MAX_BYTES.
  """
  if folder is None:
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  try:
    if folder is None:
      folder = str(default_folder())
      drop_oldest(folder, MAX_BYTES)
    if folder and "://" not in folder:
      os.makedirs(folder, exist_ok=True)
      _add_checksums(folder)
  except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
    logging.warning("compiled programs are not kept: %s", error)
    folder = ""
  jax.config.update("jax_compilation_cache_dir", folder or None)
  # Small programs too: a start has dozens of them.
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  warnings.filterwarnings(
    "ignore", r"Error (reading|writing) persistent compilation cache"
  )
  _hide_errors_of_loading()


def drop_oldest(folder: str | os.PathLike, max_bytes: int) -> None:
  """Deletes entries, the one used longest ago first, down to a size."""
  entries = []
  for path in pathlib.Path(folder).glob(f"{_ENTRIES}*"):
    with contextlib.suppress(FileNotFoundError):  # another process dropped it
      stat = path.stat()
      entries.append((max(stat.st_atime, stat.st_mtime), stat.st_size, path))
  size = sum(size for _, size, _ in entries)
  for _, of_entry, path in sorted(entries):
    if size <= max_bytes:
      break
    path.unlink(missing_ok=True)
    size -= of_entry


def _add_checksums(folder: str) -> None:
  """Lets every entry that JAX writes from now on be compressed anew.

  JAX's compression has no checksum, by which its decompression would notice
  damage, and a program with a flipped bit may crash the process.
  """
  known = set(os.listdir(folder))
  compressor = zstandard.ZstdCompressor(write_checksum=True)

  def compress_new(event: str, *_, **__) -> None:
    if event != _COMPILED:
      return
    for path in pathlib.Path(folder).glob(_ENTRIES):
      if path.name in known:
        continue
      known.add(path.name)
      # Another process may be writing it, and will do the same.
      with contextlib.suppress(OSError, zstandard.ZstdError):
        program = zstandard.decompress(path.read_bytes())
        # A name that nobody knows, so that no link waits there.
        partial = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        with open(partial, "xb") as f:
          f.write(compressor.compress(program))
        partial.replace(path)

  jax.monitoring.register_event_duration_secs_listener(compress_new)


def _hide_errors_of_loading() -> None:
  """Lets XLA's C++ log fatal errors only, if the environment does not choose.

  On some Intel CPUs XLA takes hints for tuning for features that the machine
  lacks, and logs an error for each program that it loads (openxla/xla#44565).
  Errors that stop a program are Python's exceptions.
  """
  chosen = os.environ.get("TF_CPP_MIN_LOG_LEVEL", "1") != "1"  # JAX sets 1
  if not chosen and "JAX_LOGGING_LEVEL" not in os.environ:
    jax.config.update("jax_logging_level", "CRITICAL")
    jax.config.update("jax_logging_level", "NOTSET")  # Python's loggers as ever
