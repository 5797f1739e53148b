"""One fault: what was done to a run, and whether it survived."""

import pathlib
import random
import re
import signal
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.faults import digest as digest_lib
from benchmarks.faults.digest import Lost
from benchmarks.faults.process import Process
from benchmarks.faults.scene import HALF, SAVE_EVERY, STEPS, Scene

# Ends of a disturbed run: well, in one line, for a signal that it was sent.
GOOD_ENDS = (
  0,
  2,
  130,
  -signal.SIGKILL,
  -signal.SIGTERM,
  -signal.SIGINT,
  -signal.SIGHUP,
)
# A run that was disturbed ends by as many starts of its command.
STARTS = 3


class Trial:
  """A run to be disturbed.

  Args:
    scene: of the run.
    rng: decides where and when.
    workdir: of the run.
    half: whether half of the run is done.
  Attributes:
    processes: that were started.
    damaged: how many checkpoints the fault takes away.
    loses_logs: whether the fault takes records of the past away.
    mend: takes the fault away again.
    hit: whether the fault came about.
    stopped: (steps, saves, seconds) that began, and passed, from a request to
      stop until the end; None: there was none.
  """

  def __init__(
    self, scene: Scene, rng: random.Random, workdir: pathlib.Path, half: bool
  ):
    self.scene, self.rng, self.workdir, self.half = scene, rng, workdir, half
    self.processes: list[Process] = []
    self.damaged = 0
    self.loses_logs = False
    self.mend: Callable[[], None] = lambda: None
    self.hit = True
    self.told = ""
    self.stopped: tuple[int, int, float] | None = None
    # How often a run saves may change when it goes on.
    self.every = rng.choice((1, 2, SAVE_EVERY))

  def start(
    self, prepare: Sequence[Callable[[], None]] = (), every: int | None = None
  ) -> Process:
    """Starts the run, all of its processes; returns the first."""
    started = self.scene.start(
      self.workdir, {"checkpoint.every": every or self.every}, prepare
    )
    self.processes += started
    return started[0]

  def finish(self) -> list[Process]:
    """Waits until no process runs; checks how each ended."""
    for process in self.processes:
      process.finish()
      errors = process.errors.splitlines()
      good = process.status in GOOD_ENDS
      # One of several processes that ends because another is gone.
      good |= process.status == 1 and " is gone, so process " in process.errors
      if not good or "Traceback" in process.errors:
        raise Lost(f"ended with {process.status}: {process.errors[:3000]}")
      if process.status == 2:
        self.told = errors[-1] if errors else ""
        if not self.told.startswith("error: "):
          raise Lost(f"its last line is no error: {process.errors[-800:]}")
    return self.processes

  def survive(self) -> None:
    """Runs the same command until its end; raises Lost if it is another."""
    self.finish()
    self.mend()
    reached = max(
      (p.count("step") + _first(p) for p in self.processes), default=0
    )
    reached = max(reached, HALF - 1 if self.half else 0)
    for start in range(STARTS):
      process, *others = self.scene.start(self.workdir)
      for other in (process, *others):
        other.finish()
      if process.status != 0:
        raise Lost(f"does not go on: {process.errors[-1500:]}")
      if start == 0:
        # What had begun when it was ended was not done.
        lost = min(reached, STEPS) - _first(process)
        if lost > SAVE_EVERY * (1 + self.damaged):
          raise Lost(f"{lost} steps lost: {process.errors[-500:]}")
      if "stopped at step" not in process.output:
        self._compare(digest_lib.of_run(self.workdir), _first(process))
        return
    raise Lost("does not end")

  def _compare(self, found: dict[str, Any], resumed: int) -> None:
    expected = self.scene.digest
    for name, value in expected.items():
      if name == "metrics" and self.loses_logs:
        # Records of the steps that are taken again, a line each.
        count = STEPS - resumed
        same = found[name][-count:] == value[-count:] if count else True
      else:
        same = found[name] == value
      if not same:
        raise Lost(f"{name} differs: {found[name]}, not {value}")


def _first(process: Process) -> int:
  """Returns the step from which a run went on."""
  found = re.findall(
    r"going on from the checkpoint of step (\d+)", process.errors
  )
  return int(found[-1]) if found else 0
