"""Faults that end a run: kills, signals, and what stops one of two."""

import signal
import time

from benchmarks.faults.scene import STEPS
from benchmarks.faults.trial import Trial

ASKING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# Event -> how often it happens at least, where a run starts over.
TIMES = {"start": 0, "restore": 1, "step": STEPS // 4, "save": 1, "end": 1}


def _reach(trial: Trial, process, moment: str) -> None:
  """Waits for a random moment within a part of a run."""
  times = TIMES[moment]
  if times:
    trial.hit = process.wait_for(moment, trial.rng.randint(1, times))
  # The machine may be slower now.
  longest = 1.5 * trial.scene.seconds[moment]
  process.sleep(trial.rng.uniform(0, longest))


def kill(moment: str):
  """Returns the fault that kills a run within a part of it."""

  def fault(trial: Trial) -> None:
    process = trial.start()
    _reach(trial, process, moment)
    process.signal(signal.SIGKILL)

  return fault


def kill_often(trial: Trial) -> None:
  """Kills a run, and what goes on with it, three times."""
  for _ in range(3):
    process = trial.start(every=1)
    process.wait_for(trial.rng.choice(("restore", "step", "save")))
    process.sleep(trial.rng.uniform(0, 2 * trial.scene.seconds["save"]))
    process.signal(signal.SIGKILL)
    process.finish()


def stop(*numbers: signal.Signals):
  """Returns the fault that asks a run to stop while it takes steps."""

  def fault(trial: Trial) -> None:
    process = trial.start()
    process.wait_for("step", trial.rng.randint(1, STEPS // 4))
    process.sleep(trial.rng.uniform(0, 3 * trial.scene.seconds["step"]))
    number = trial.rng.choice(numbers)
    asked = time.monotonic()
    process.signal(number)
    process.finish()
    trial.hit = "saving and stopping" in process.errors
    if trial.hit and "stopped at step" in process.output:
      saved = [e for e in process.events if (e.name, e.edge) == ("save", "end")]
      trial.stopped = (
        process.count("step", since=asked),
        process.count("save", since=asked),
        max(0.0, saved[-1].seconds - asked),
      )

  return fault


def stop_early(trial: Trial) -> None:
  """Asks a run to stop at any moment before its first step."""
  process = trial.start()
  process.sleep(trial.rng.uniform(0, 1.2 * trial.scene.seconds["start"]))
  process.signal(trial.rng.choice(ASKING))


def storm(trial: Trial) -> None:
  """Sends signals of all kinds, shortly after each other."""
  process = trial.start()
  process.wait_for(trial.rng.choice(("open", "restore", "step", "save")))
  for _ in range(trial.rng.randint(3, 9)):
    process.signal(trial.rng.choice(ASKING))
    process.sleep(trial.rng.uniform(0, trial.scene.seconds["save"] / 2))


def pause(trial: Trial) -> None:
  """Halts a run several times, as a batch system does."""
  process = trial.start()
  process.wait_for(trial.rng.choice(("restore", "step", "save")))
  for _ in range(3):
    process.signal(signal.SIGSTOP)
    time.sleep(trial.rng.uniform(0, 0.2))
    process.signal(signal.SIGCONT)
    process.sleep(trial.rng.uniform(0, 0.05))


def kill_one(trial: Trial) -> None:
  """Kills one of two processes; the other has to end by itself."""
  trial.start()
  first, second = trial.processes
  first.wait_for(trial.rng.choice(("restore", "step", "save")))
  first.sleep(trial.rng.uniform(0, trial.scene.seconds["save"]))
  trial.rng.choice((first, second)).signal(signal.SIGKILL)


def stop_one(trial: Trial) -> None:
  """Asks one of two processes to stop; both do."""
  trial.start()
  first, second = trial.processes
  first.wait_for("step", trial.rng.randint(1, STEPS // 4))
  trial.rng.choice((first, second)).signal(signal.SIGTERM)
