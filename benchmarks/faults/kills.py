"""Faults that end a run: kills, signals, and what stops one of two."""

import signal
import time
from collections.abc import Callable

from benchmarks.faults.digest import Lost
from benchmarks.faults.process import Process
from benchmarks.faults.scene import HALF, SAVE_EVERY, STEPS
from benchmarks.faults.trial import INTERRUPTED, Trial

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What a process that is asked to stop, or whose peer is gone, may take.
PEER_SECONDS = 60
# Part of a run -> the event that begins it, and how often that happens at
# least, where a run starts over.
BEGINS = {
  "restore": ("restore", 1),
  "step": ("step", STEPS // 4),
  "save": ("save", 1),
}


def _reach(trial: Trial, process: Process, moment: str) -> None:
  """Waits for a random moment within a part of a run."""
  longest = trial.scene.seconds[moment]
  if moment == "end":
    # Half a run goes on from the step of its last save.
    done = HALF // SAVE_EVERY * SAVE_EVERY if trial.half else 0
    process.wait_for("step", STEPS - done)
  elif moment != "start":
    name, times = BEGINS[moment]
    process.wait_for(name, trial.rng.randint(1, times))
  process.sleep(trial.rng.uniform(0, longest))


def kill(moment: str) -> Callable[[Trial], None]:
  """Returns the fault that kills a run within a part of it."""

  def fault(trial: Trial) -> None:
    process = trial.start()
    _reach(trial, process, moment)
    trial.kill(process)
    if moment in ("restore", "save"):
      trial.hit &= trial.moment == moment

  return fault


def kill_often(trial: Trial) -> None:
  """Kills a run, and what goes on with it, three times."""
  trial.every, hits = 1, 0
  for _ in range(3):
    process = trial.start()
    process.wait_for(trial.rng.choice(("restore", "step", "save")))
    process.sleep(trial.rng.uniform(0, 2 * trial.scene.seconds["save"]))
    trial.kill(process)
    hits += trial.hit
  trial.hit = hits > 1


def stop(*numbers: signal.Signals) -> Callable[[Trial], None]:
  """Returns the fault that asks a run to stop while it takes steps."""

  def fault(trial: Trial) -> None:
    process = trial.start()
    process.wait_for("step", trial.rng.randint(1, STEPS // 4))
    process.sleep(trial.rng.uniform(0, 3 * trial.scene.seconds["step"]))
    trial.hit = process.signal(trial.rng.choice(numbers))
    process.finish()
    trial.hit &= "saving and stopping" in process.errors
    if trial.hit:
      trial.moment = process.moment(process.sent[0][1])
      trial.stopped = after_signal(process)

  return fault


def after_signal(process: Process) -> tuple[int, int, float]:
  """Returns the steps and saves that began after a signal, and seconds.

  These are from the signal until the last save ended; 0 if it had before.
  """
  asked = process.sent[0][1]
  saved = [
    e.seconds for e in process.events if (e.name, e.edge) == ("save", "end")
  ]
  return (
    process.count("step", since=asked),
    process.count("save", since=asked),
    max(0.0, max(saved, default=asked) - asked),
  )


def _ended_early(process: Process) -> bool:
  """Returns whether a signal ended a process, and not its own last step."""
  status = process.finish().status or 0
  stopped = "stopped at step" in process.output
  return status < 0 or status == INTERRUPTED or stopped


def stop_early(trial: Trial) -> None:
  """Asks a run to stop at any moment before its first step."""
  process = trial.start()
  process.sleep(trial.rng.uniform(0, trial.scene.seconds["start"]))
  trial.hit = process.signal(trial.rng.choice(ASKING))
  trial.hit &= _ended_early(process)


def storm(trial: Trial) -> None:
  """Sends signals of all kinds, shortly after each other."""
  process = trial.start()
  process.wait_for(trial.rng.choice(("open", "restore", "step", "save")))
  for _ in range(trial.rng.randint(3, 9)):
    process.signal(trial.rng.choice(ASKING))
    process.sleep(trial.rng.uniform(0, trial.scene.seconds["save"] / 2))
  trial.hit = bool(process.sent) and _ended_early(process)


def pause(trial: Trial) -> None:
  """Halts a run several times, as a batch system does."""
  process = trial.start()
  process.wait_for(trial.rng.choice(("restore", "step", "save")))
  halts = 0
  for _ in range(3):
    halts += process.signal(signal.SIGSTOP)
    time.sleep(trial.rng.uniform(0, 0.2))
    process.signal(signal.SIGCONT)
    process.sleep(trial.rng.uniform(0, 0.05))
  trial.hit = halts == 3


def kill_one(trial: Trial) -> None:
  """Kills one of two processes; the other has to end by itself, and soon."""
  trial.start()
  first, second = trial.processes
  first.wait_for(trial.rng.choice(("restore", "step", "save")))
  first.sleep(trial.rng.uniform(0, trial.scene.seconds["save"]))
  killed, other = trial.rng.sample((first, second), 2)
  trial.kill(killed)
  other.finish()
  waited = other.ended - killed.ended
  if trial.hit and waited > PEER_SECONDS:
    raise Lost(f"the other process ended {waited:.0f} s later")


def stop_one(trial: Trial) -> None:
  """Asks one of two processes to stop; both do."""
  trial.start()
  both = trial.processes
  both[0].wait_for("step", trial.rng.randint(1, STEPS // 4))
  trial.hit = trial.rng.choice(both).signal(signal.SIGTERM)
  # The first stands for both.
  trial.hit &= _ended_early(both[0])
