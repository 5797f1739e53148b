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

WELL, REFUSED, INTERRUPTED = 0, 2, 130  # statuses of a run
# A run that was disturbed ends by as many starts of its command.
STARTS = 3


class Trial:
  """A run to be disturbed.

  Args:
    scene: of the run.
    rng: decides where and when.
    place: folder for all of its files.
    half: whether half of the run is done.
  Attributes:
    workdir: of the run.
    data: folder of its text.
    cache: of compiled programs; a fault of them takes a copy.
    processes: that were started.
    damaged: how many checkpoints the fault takes away.
    loses_logs: whether the fault takes records of the past away.
    mend: takes the fault away again.
    hit: whether the fault came about.
    moment: in which it did, as `Process.moment` names it.
    stopped: (steps, saves, seconds) that began, and passed, from a request to
      stop until the end; None: there was none.
  """

  def __init__(
    self, scene: Scene, rng: random.Random, place: pathlib.Path, half: bool
  ):
    self.scene, self.rng, self.half = scene, rng, half
    self.workdir, self.data = place / "run", place / "data"
    self.cache = scene.cache
    self.processes: list[Process] = []
    self.damaged = 0
    self.loses_logs = False
    self.mend: Callable[[], None] = lambda: None
    self.hit = True
    self.moment = ""
    self.told = ""
    self.stopped: tuple[int, int, float] | None = None
    # How often a run saves may change when it goes on.
    self.every = rng.choice((1, 2, SAVE_EVERY))
    self._mark = place / "mark"

  def mark(self) -> None:
    """Tells, from a disturbed process, that the fault has come about."""
    if not self._mark.exists():
      self._mark.touch()

  @property
  def marked(self) -> bool:
    return self._mark.exists()

  def start(self, prepare: Sequence[Callable[[], None]] = ()) -> Process:
    """Starts the run, all of its processes; returns the first."""
    settings = {"checkpoint.every": self.every}
    started = self.scene.start(self.workdir, settings, prepare, self.cache)
    self.processes += started
    return started[0]

  def kill(self, process: Process) -> None:
    """Kills a process; it is a hit if it had not ended."""
    self.hit = process.signal(signal.SIGKILL)
    process.finish()
    self.hit &= process.status == -signal.SIGKILL
    self.moment = process.moment(process.ended)

  def finish(self) -> list[Process]:
    """Waits until no process runs; checks how each ended."""
    for process in self.processes:
      process.finish()
      self._require_good_end(process)
      if process.status == REFUSED:
        errors = process.errors.splitlines()
        self.told = errors[-1] if errors else ""
        if not self.told.startswith("error: "):
          raise Lost(f"its last line is not an error: {process.errors[-800:]}")
    return self.processes

  def _require_good_end(self, process: Process) -> None:
    """Raises Lost unless a run ended well, in a line, or as it was asked to."""
    status = process.status
    assert status is not None
    asked = status < 0 and process.was_sent(-status)
    asked |= status == INTERRUPTED and process.was_sent(signal.SIGINT)
    # One of several processes that ends because another is gone.
    follows = status == 1 and " is gone, so process " in process.errors
    good = status in (WELL, REFUSED) or asked or follows
    if process.hangs:
      raise Lost(f"hangs: {process.errors[-3000:]}")
    if not good or "Traceback" in process.errors:
      raise Lost(f"ended with {status}: {process.errors[-3000:]}")

  def survive(self) -> None:
    """Runs the same command until its end; raises Lost if it is another."""
    self.finish()
    self.mend()
    reached = max(
      (p.count("step") + resumed_at(p) for p in self.processes), default=0
    )
    reached = max(reached, HALF - 1 if self.half else 0)
    for start in range(STARTS):
      process, *others = self.scene.start(self.workdir, cache=self.cache)
      for other in (process, *others):
        other.finish()
      if process.status != 0 or process.hangs:
        raise Lost(f"does not go on: {process.errors[-1500:]}")
      if start == 0:
        self._require_steps(reached, resumed_at(process))
      if "stopped at step" not in process.output:
        self._compare(digest_lib.of_run(self.workdir), resumed_at(process))
        return
    raise Lost("does not end")

  def _require_steps(self, reached: int, resumed: int) -> None:
    """Raises Lost if more steps are taken again than one save would have kept.

    A run that was asked to stop, and said that it did, has saved all of them.

    Args:
      reached: steps that were begun before.
      resumed: the step from which the run goes on.
    """
    # What had begun when it was ended was not done.
    lost = min(reached, STEPS) - resumed
    stopped = any("stopped at step" in p.output for p in self.processes[-1:])
    allowed = 0 if stopped else self.every
    if lost > allowed + SAVE_EVERY * self.damaged:
      raise Lost(f"{lost} steps lost: went on from {resumed} of {reached}")

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


def resumed_at(process: Process) -> int:
  """Returns the step from which a run went on."""
  found = re.findall(
    r"resuming from the checkpoint of step (\d+)", process.errors
  )
  return int(found[-1]) if found else 0
