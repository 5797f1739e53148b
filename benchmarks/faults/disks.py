"""Faults of the disk and the system: full, read-only, failing, slow, scarce."""

import builtins
import errno
import io
import os
import pathlib
import resource
import signal
import subprocess
import time
from collections.abc import Callable

from benchmarks.faults.trial import Trial

ERRORS = ("EIO", "ENOSPC", "EDQUOT", "ESTALE", "EACCES", "EROFS", "EMFILE")
# Where Python code meets the file system.
CALLS = (
  (os, "fsync"),
  (os, "replace"),
  (os, "rename"),
  (os, "mkdir"),
  (os, "open"),
  (os, "stat"),
  (os, "scandir"),
  (io, "open"),
  (builtins, "open"),
)


def limit(name: int, value: int) -> Callable[[], None]:
  """Returns a function that limits a resource of this process."""
  return lambda: resource.setrlimit(name, (value, value))


def _told(trial: Trial, number: int) -> bool:
  """Returns whether a run failed, or warned of an error of the system."""
  process = trial.finish()[0]
  return process.status != 0 or os.strerror(number) in process.errors


def file_limit(trial: Trial) -> None:
  """No file may grow beyond a size: writes fail as on a full disk."""
  size = int(10 ** trial.rng.uniform(1.5, 5))
  trial.start([limit(resource.RLIMIT_FSIZE, size)])
  trial.hit = _told(trial, errno.EFBIG)


def few_files(trial: Trial) -> None:
  """The process may open few files."""
  trial.start([limit(resource.RLIMIT_NOFILE, trial.rng.randint(12, 70))])
  trial.hit = _told(trial, errno.EMFILE)


def few_bytes(trial: Trial) -> None:
  """A disk of its own is full before the run is done, and then grows."""
  _mount(trial, "size=64m,mode=755")
  disk = os.statvfs(trial.workdir)
  used = (disk.f_blocks - disk.f_bfree) * disk.f_frsize // 1024
  _remount(trial, f"size={used + 4 * trial.rng.randint(5, 150)}k")
  trial.every = 1
  trial.start()
  trial.hit = _told(trial, errno.ENOSPC)
  _remount(trial, "size=64m")


def read_only(trial: Trial) -> None:
  """The disk is read-only, as one is after an error."""
  _mount(trial, "size=64m,mode=755")
  _remount(trial, "ro")
  trial.start()
  trial.hit = _told(trial, errno.EROFS)
  _remount(trial, "rw")


def _mount(trial: Trial, options: str) -> None:
  """Lets the workdir lie on a file system of its own."""
  trial.workdir.mkdir(exist_ok=True)
  subprocess.run(
    ["mount", "-t", "tmpfs", "-o", options, "faults", trial.workdir], check=True
  )
  if trial.half:
    subprocess.run(
      ["cp", "-r", f"{trial.scene.half}/.", trial.workdir], check=True
    )


def _remount(trial: Trial, options: str) -> None:
  subprocess.run(
    ["mount", "-o", f"remount,{options}", trial.workdir], check=True
  )


def unmount(folder: pathlib.Path) -> None:
  """Unmounts what was mounted in a folder, if anything was."""
  if folder.is_mount():
    subprocess.run(["umount", folder], check=False)


def can_mount(folder: pathlib.Path) -> bool:
  """Returns whether this process may mount file systems."""
  command = ["mount", "-t", "tmpfs", "-o", "size=64k", "faults", folder]
  try:
    mounted = subprocess.run(command, capture_output=True).returncode == 0
  except OSError:
    return False
  if mounted:
    unmount(folder)
  return mounted


def errors(trial: Trial) -> None:
  """Calls of the file system fail, from a random one on, below the workdir."""
  first, rng = trial.rng.randint(0, 150), trial.rng
  last = first + rng.choice((1, 3, 10**6))
  number = getattr(errno, rng.choice(ERRORS))

  def fail(count):
    if first <= count < last:
      trial.mark()
      raise OSError(number, os.strerror(number))

  trial.start([_around_calls(trial.workdir, fail)]).finish()
  trial.hit = trial.marked


def slow(trial: Trial) -> None:
  """The file system takes its time, and the run is to stop."""
  seconds = trial.rng.uniform(0.002, 0.02)
  process = trial.start(
    [_around_calls(trial.workdir, lambda count: time.sleep(seconds))]
  )
  process.wait_for("step", trial.rng.randint(1, 3))
  process.sleep(trial.rng.uniform(0, trial.scene.seconds["save"]))
  trial.hit = process.signal(signal.SIGTERM)


def _around_calls(
  workdir: pathlib.Path, disturb: Callable[[int], None]
) -> Callable[[], None]:
  """Returns a function that disturbs calls which concern files of a workdir."""
  counted = iter(range(10**9))

  def wrap(owner, name):
    inner = getattr(owner, name)

    def disturbed(*arguments, **named):
      if _concerns(workdir, *arguments[:1]):
        disturb(next(counted))
      return inner(*arguments, **named)

    setattr(owner, name, disturbed)

  def prepare():
    for owner, name in CALLS:
      wrap(owner, name)

  return prepare


def _concerns(workdir: pathlib.Path, file: object = None) -> bool:
  try:
    if isinstance(file, int):
      file = os.readlink(f"/proc/self/fd/{file}")
    return isinstance(file, (str, os.PathLike)) and os.fspath(file).startswith(
      str(workdir)
    )
  except OSError:
    return False


def console(trial: Trial) -> None:
  """Nobody takes what the run prints: a full disk, a closed pipe, no file."""
  kind = trial.rng.choice(("full", "broken", "closed"))
  trial.moment = kind

  def prepare():
    for fd in (1, 2):
      if kind == "full":
        os.dup2(os.open("/dev/full", os.O_WRONLY), fd)
      elif kind == "broken":
        reading, writing = os.pipe()
        os.dup2(writing, fd)
        os.close(reading)
        os.close(writing)
      else:
        os.close(fd)

  trial.start([prepare])
