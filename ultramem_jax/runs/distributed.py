"""Starts and ends the processes of a run, on one host or several.

All run the same program with the same arguments except --process_id, and each
has some of the devices of one mesh. Only process 0 prints and writes logs. Each
process reads its own rows of a batch and saves its own parts of a checkpoint.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import socket
import sys
import time
import traceback
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ultramem_jax.runs import peers
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.errors import ConfigError

AUTO = "auto"
# Seconds without a sign of life after which JAX takes a process for dead.
HEARTBEAT_SECONDS = 50
# Seconds that `peers` has to end this process and say why an exchange failed.
NAMING_SECONDS = 5
# Seconds after which a file of another host should be seen.
SEEN_SECONDS = 10


def initialize(
  coordinator: str | None = None,
  count: int | None = None,
  index: int | None = None,
  stops_together: bool = False,
) -> None:
  """Joins the other processes, if there are any.

  Call it before any device is used.

  Args:
    coordinator: "HOST:PORT" of process 0; "auto": JAX asks the cluster for all
      three; None: the same if the cluster started several processes, else this
      process works on its own.
    count, index: how many processes there are, and which this one is. Given
      with HOST:PORT, and only then.
    stops_together: whether SIGTERM to one of several processes waits until
      `preemption.Preemption` stops them all at one step; otherwise it ends that
      process, and with it all of them.
  Raises:
    ConfigError: arguments that do not go together, or no cluster that JAX
      knows (the message names the flags of `cli.define_processes`); or there is
      no device.
  """
  # If it is on and nobody asks it, JAX's preemption service swallows SIGTERM.
  jax.config.update("jax_enable_preemption_service", stops_together)
  if coordinator in (None, AUTO):
    require(
      count is None and index is None,
      "--coordinator",
      coordinator,
      "must be HOST:PORT with --num_processes and --process_id",
    )
    # A single process that asked its cluster would get one of Slurm's GPUs, or
    # wait for others.
    if coordinator is None and not _started_by_cluster():
      return
    _join_cluster(coordinator)
  else:
    _join_coordinator(coordinator, count, index)
  devices()
  if jax.process_index() > 0:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
  _watch(coordinator)


def devices() -> list[Any]:
  """Returns the devices of all processes, those of JAX_PLATFORMS if it is set.

  Raises:
    ConfigError: there are none.
  """
  try:
    return jax.devices()
  except (RuntimeError, AssertionError) as error:
    # JAX asserts, without a word, that there is a plugin for CUDA.
    cause = str(error).splitlines() or ["no plugin for it is installed"]
    raise ConfigError(
      f"JAX_PLATFORMS = {os.environ.get('JAX_PLATFORMS')!r}: JAX finds no such "
      f"device ({cause[0]})"
    ) from error


def _join_cluster(coordinator: str | None) -> None:
  try:
    jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_SECONDS)
  except ValueError as error:
    raise ConfigError(
      f"--coordinator = {coordinator!r}: JAX finds no cluster here "
      f"({error}); give HOST:PORT, --num_processes and --process_id"
    ) from error


def _join_coordinator(
  coordinator: str, count: int | None, index: int | None
) -> None:
  require(
    re.fullmatch(r"\S+:\d+", coordinator) is not None,
    "--coordinator",
    coordinator,
    "must be HOST:PORT or auto",
  )
  if count is None or index is None:
    raise ConfigError(
      f"--coordinator = {coordinator!r}: needs --num_processes and --process_id"
    )
  require(
    index < count,
    "--process_id",
    index,
    f"must be less than --num_processes = {count}",
  )
  # Each process keeps all devices that it sees on its host.
  jax.distributed.initialize(
    coordinator,
    count,
    index,
    cluster_detection_method="deactivate",
    heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
  )


def _watch(coordinator: str | None) -> None:
  """Lets this process end, with a line, as soon as another one is gone."""
  index = jax.process_index()
  watch = peers.Watch(index, jax.process_count())
  port = of_process_0(watch.listen() if index == 0 else 0)
  name = merged({"name": socket.gethostname()} if index == 0 else {})["name"]
  if index > 0:
    by_hand = coordinator not in (None, AUTO)
    watch.connect(coordinator.rpartition(":")[0] if by_hand else name, port)


def _started_by_cluster() -> bool:
  """Returns whether the environment tells JAX of several processes."""
  environment = os.environ
  counts = (
    # Not SLURM_NTASKS, which a shell within a job has, too.
    "SLURM_STEP_NUM_TASKS",
    "OMPI_COMM_WORLD_SIZE",
    "MEGASCALE_NUM_SLICES",
  )
  hosts = environment.get("TPU_PROCESS_ADDRESSES") or environment.get(
    "TPU_WORKER_HOSTNAMES", ""
  )
  return "," in hosts or any(
    int(environment.get(name) or 1) > 1 for name in counts
  )


def require_same(name: str, value: str) -> None:
  """Checks that all processes were given the same value.

  Raises:
    ConfigError: on all of them, if one was not.
  """
  if jax.process_count() == 1:
    return
  digest = hashlib.sha256(value.encode()).digest()
  digests = multihost_utils.process_allgather(np.frombuffer(digest, np.uint8))
  others = np.flatnonzero((digests != digests[:1]).any(1)).tolist()
  if others:
    raise ConfigError(
      f"{name}: processes {others} were given other values than process 0"
    )


def any_process(flag: bool) -> bool:
  """Returns whether flag is true on any process."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def of_process_0(number: int) -> int:
  """Returns the number that process 0 has."""
  if jax.process_count() == 1:
    return number
  return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def merged(values: dict[str, Any]) -> dict[str, Any]:
  """Returns the entries that any process has, which JSON can represent."""
  if jax.process_count() == 1:
    return values
  own = np.frombuffer(json.dumps(values).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(own.size))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: own.size] = own
  merged = {}
  rows = multihost_utils.process_allgather(padded)
  for row, size in zip(rows, sizes, strict=True):
    merged |= json.loads(bytes(row[:size]))
  return merged


def unseen_by(path: pathlib.Path) -> list[int]:
  """Returns the processes that do not see a file which process 0 makes.

  A file system that several hosts share may show it late.

  Args:
    path: of the file, which is gone at the end.
  """
  if jax.process_count() == 1:
    return []
  if jax.process_index() == 0:
    path.touch()
  any_process(False)  # it is there
  deadline = time.monotonic() + SEEN_SECONDS
  while not (is_seen := path.exists()) and time.monotonic() < deadline:
    time.sleep(0.1)
  unseen = merged({} if is_seen else {str(jax.process_index()): True})
  if jax.process_index() == 0:
    path.unlink(missing_ok=True)
  return sorted(map(int, unseen))


@contextlib.contextmanager
def ending_at_once() -> Iterator[None]:
  """Ends this process, and with it all others, if the body fails.

  At a normal exit Python waits for the threads of libraries, which may wait for
  what failed, and JAX waits for all processes, while they may wait for this one
  in a step. Without that wait, JAX ends the others.
  """
  try:
    yield
  except BaseException as error:
    asked = isinstance(error, SystemExit)
    if asked and not error.code:
      raise
    # An exchange that fails raises errors of several classes.
    if isinstance(error, Exception) and jax.process_count() > 1:
      time.sleep(NAMING_SECONDS)
    # Whether a stream takes what is left decides nothing any more.
    with contextlib.suppress(OSError):
      if not asked:
        traceback.print_exc()
      sys.stderr.flush()
    with contextlib.suppress(OSError):
      sys.stdout.flush()
    os._exit(error.code if asked and isinstance(error.code, int) else 1)
