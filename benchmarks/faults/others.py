"""Faults of other kinds: a second run, wrong numbers, a wrong clock."""

import os
import shutil
import signal
import time
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.faults.digest import Lost
from benchmarks.faults.trial import Trial
from ultramem_jax.train.program import TrainProgram


def second(trial: Trial) -> None:
  """Starts the same command twice; one of them trains."""
  first = trial.start()
  first.sleep(trial.rng.uniform(0, 1.2 * trial.scene.seconds["start"]))
  other = trial.start()
  trial.finish()
  both = [first.status, other.status]
  if 0 not in both:
    raise Lost(f"neither trained: {first.errors} {other.errors}")
  # Otherwise the first had ended before the second took the workdir.
  trial.hit = 2 in both
  if trial.hit and "another process is training" not in trial.told:
    raise Lost(f"it ends with another line: {trial.told}")


def not_a_number(trial: Trial) -> None:
  """A number of the state is none after some step, as after a flipped bit."""
  poisoned = trial.rng.randint(1, 3)
  leaf_seed = trial.rng.random()

  def prepare():
    inner, steps = TrainProgram.__call__, iter(range(10**9))

    def step(self, state, batch):
      state, metrics = inner(self, state, batch)
      if next(steps) + 1 == poisoned:
        trial.mark()
        state = _poison(state, leaf_seed)
      return state, metrics

    TrainProgram.__call__ = step

  process = trial.start([prepare]).finish()
  trial.hit = trial.marked
  if trial.hit and process.status != 2:
    raise Lost(f"it went on with it: {process.errors[-500:]}")


def _poison(state: Any, where: float) -> Any:
  """Returns a state of which a parameter holds a number that is none."""
  leaves, treedef = jax.tree.flatten(state)
  paths = jax.tree_util.tree_leaves_with_path(state)
  chosen = [
    index
    for index, (path, leaf) in enumerate(paths)
    if "params" in jax.tree_util.keystr(path)
    and jnp.issubdtype(leaf.dtype, jnp.floating)
  ]
  index = chosen[int(where * len(chosen))]
  leaf = leaves[index]
  first = (0,) * leaf.ndim
  leaves[index] = jax.device_put(leaf.at[first].set(jnp.nan), leaf.sharding)
  return jax.tree.unflatten(treedef, leaves)


def clock(trial: Trial) -> None:
  """The clock jumps back and forth, and the files' times with it."""
  jumps = [trial.rng.uniform(-1e9, 1e8) for _ in range(7)]

  def prepare():
    inner, calls = time.time, iter(range(10**9))

    def jumping():
      trial.mark()
      return inner() + jumps[next(calls) % len(jumps)]

    time.time = jumping

  for path in trial.workdir.rglob("*"):
    moment = time.time() + trial.rng.choice(jumps)
    os.utime(path, (moment, moment))
  process = trial.start([prepare])
  if trial.rng.random() < 0.7:
    process.wait_for("step", 2)
    process.signal(signal.SIGTERM)
  process.finish()
  trial.hit = trial.marked


def renamed(trial: Trial) -> None:
  """The workdir is renamed while the run uses it, and renamed back."""
  process = trial.start()
  process.wait_for(trial.rng.choice(("compile", "restore", "step", "save")))
  process.sleep(trial.rng.uniform(0, trial.scene.seconds["save"]))
  elsewhere = trial.workdir.with_name("elsewhere")
  shutil.rmtree(elsewhere, ignore_errors=True)
  process.poll(0)
  trial.hit = trial.workdir.exists() and process.status is None
  if trial.hit:
    trial.workdir.rename(elsewhere)
  process.finish()
  if trial.hit and trial.workdir.exists():
    # A save that had begun may end at the old name, and nothing else be there.
    made = {
      path.relative_to(trial.workdir).parts[:2]
      for path in trial.workdir.rglob("*")
      if ".orbax" not in str(path)
    }
    if {name for name, *_ in made} - {"checkpoints"} or len(made) > 2:
      raise Lost(f"the run has made a new workdir: {sorted(made)}")
    shutil.rmtree(trial.workdir)
  if trial.hit:
    elsewhere.rename(trial.workdir)
