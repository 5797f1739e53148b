"""The loop over training steps, without a model."""

import contextlib
import os
import signal
import threading
import time
import types

import jax
import numpy as np
import pytest

from tests.train import small_steps
from ultramem_jax import testing
from ultramem_jax.data.pipeline import Prefetch
from ultramem_jax.runs import checkpoint, preemption
from ultramem_jax.settings.errors import TrainingError
from ultramem_jax.train import guard, loop
from ultramem_jax.train import mesh as mesh_lib


class Log:
  """Notes what is called, and with which first argument."""

  def __init__(self, done):
    self._done = done

  def __getattr__(self, name):
    return lambda *arguments: self._done.append((name, *arguments[:1]))


def test_a_step_is_recorded_before_it_is_validated_and_saved():
  """The order that makes the log of a resumed run equal an unbroken one's.

  Otherwise it is recorded when the next one has been dispatched.
  """
  config = testing.small_config(
    steps=5, log_every=2, eval_every=3, checkpoint__every=4
  )
  done = []

  def take_step(n, state):
    assert n == state.step + 1
    done.append(("step", n))
    values = {"loss": 1.0}
    return types.SimpleNamespace(step=n), values

  state, results = loop.run_steps(
    config,
    types.SimpleNamespace(step=1),
    take_step,
    check=lambda n, values: done.append(("check", n)),
    report_usage=lambda state: (state, {"coverage": 0.5}),
    validate=lambda state: {"loss": float(state.step)},
    save=lambda n, state, results: done.append(("save", n, results)),
    log=Log(done),
    stop=preemption.Preemption(),
  )
  assert (state.step, results) == (5, {"loss": 5.0})
  assert done == [
    ("step", 2),
    ("step", 3),
    ("check", 2),
    ("record_step", 2),
    ("check", 3),
    ("record_validation", 3),
    ("restart_clock", 3),
    ("step", 4),
    ("check", 4),
    ("record_step", 4),
    ("sync",),
    ("save", 4, None),
    ("restart_clock", 4),
    ("step", 5),
    ("check", 5),
    ("record_validation", 5),
    ("sync",),
    ("save", 5, {"loss": 5.0}),
    ("restart_clock", 5),
  ]


METRICS = {"loss": 1.0}


def run(stop, done, take_step=None, validate=None, **overrides):
  """Runs the loop from step 0, and notes what it does."""
  settings = {"steps": 9, "log_every": 1, "eval_every": 5}

  def just_take(n, state):
    return types.SimpleNamespace(step=n), METRICS

  return loop.run_steps(
    testing.small_config(**settings, checkpoint__every=9, **overrides),
    types.SimpleNamespace(step=0),
    take_step or just_take,
    check=lambda n, values: None,
    report_usage=lambda state: (state, {}),
    validate=validate or (lambda state: {"loss": 1.0}),
    save=lambda n, state, results: done.append(("save", n, state.step)),
    log=Log(done),
    stop=stop,
  )


def ask_to_stop_soon():
  """Sends SIGTERM while the main thread waits."""
  ask = lambda: os.kill(os.getpid(), signal.SIGTERM)
  threading.Timer(0.05, ask).start()


@contextlib.contextmanager
def at_once():
  """Whoever waits ten seconds in the body did not hear of the signal."""
  began = time.monotonic()
  yield
  assert time.monotonic() < began + 5


def test_a_signal_ends_a_validation_and_its_step_is_saved(capfd):
  done = []
  with preemption.Preemption() as stop, at_once():

    def validate(state):
      with contextlib.suppress(preemption.Stopped), stop.interruptible():
        ask_to_stop_soon()
        time.sleep(10)
        return {"loss": 1.0}

    state, results = run(stop, done, validate=validate)
  assert (state.step, results) == (5, None)
  assert done[-2:] == [("sync",), ("save", 5, 5)]
  assert ("record_step", 5) in done
  assert not any(name == "record_validation" for name, *_ in done)
  assert "SIGTERM: saving and stopping" in capfd.readouterr().err


def test_a_signal_ends_the_wait_for_data():
  """What was trained on is saved, and the place of the batch that was not."""
  done, waiting = [], threading.Event()

  class Batches:
    """Three batches; whoever asks for a fourth waits."""

    count = 0

    def __next__(self):
      if self.count == 3:
        ask_to_stop_soon()
        waiting.wait(10)
      self.count += 1
      return {"tokens": np.zeros((1, 4), np.int32)}

    def get_state(self):
      return {"0": self.count}

  mesh = mesh_lib.make(testing.small_config())
  for batches in (Batches(), Prefetch(Batches(), 1)):
    done.clear()
    with preemption.Preemption() as stop, at_once():
      feed = loop.Feed(batches, mesh, stop)

      def take_step(n, state, feed=feed):
        feed(1)
        return types.SimpleNamespace(step=n), METRICS

      state, results = run(stop, done, take_step)
    assert (state.step, results, feed.data_state) == (3, None, {"0": 3})
    assert done[-3:] == [("record_step", 3), ("sync",), ("save", 3, 3)]
  waiting.set()


def test_a_signal_before_the_first_step_saves_nothing():
  done = []
  with preemption.Preemption() as stop:

    def take_step(n, state):
      raise preemption.Stopped

    state, results = run(stop, done, take_step)
  assert (state.step, results, done) == (0, None, [])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_last_step_saves_it_and_leaves_the_rest(number, capfd):
  done = []
  with preemption.Preemption() as stop:

    def take_step(n, state):
      if n == 9:
        os.kill(os.getpid(), number)
      return types.SimpleNamespace(step=n), METRICS

    validate = lambda state: None if stop.requested() else {"loss": 1.0}
    state, results = run(stop, done, take_step, validate)
  assert (state.step, results) == (9, None)
  assert ("save", 9, 9) in done
  assert f"{number.name}: saving and stopping" in capfd.readouterr().err


@pytest.mark.parametrize(
  ("step", "due", "stopped", "expected"),
  [
    (5, True, False, [("record_validation", 5), ("sync",), ("add", 5, 0.5)]),
    (5, True, True, []),
    (5, False, False, []),
    (9, False, False, [("note", "step 9: ")]),
    (9, True, False, [("record_validation", 9), ("sync",), ("add", 9, 0.5)]),
  ],
)
def test_a_validation_that_was_stopped_is_made_up(step, due, stopped, expected):
  done = []
  restored = types.SimpleNamespace(step=step, validation_due=due)
  found = {"loss": 0.5, "perplexity": 1.0, "bits_per_byte": 1.0}
  results = loop.catch_up(
    testing.small_config(steps=9),
    None,
    restored,
    validate=lambda state: None if stopped else found,
    checkpointer=types.SimpleNamespace(
      add_loss=lambda n, loss: done.append(("add", n, loss))
    ),
    log=Log(done),
  )
  assert results == (found if expected else None)
  assert [(*x[:1], *(str(y)[:8] for y in x[1:])) for x in done] == [
    (*x[:1], *(str(y) for y in x[1:])) for x in expected
  ]


def test_a_state_that_is_not_finite_is_not_saved(tmp_path):
  state = small_steps.first_state()
  bad = state.replace(params=jax.tree.map(lambda x: x * np.nan, state.params))
  feed = types.SimpleNamespace(data_state={})
  with checkpoint.Checkpointer(tmp_path, 1) as saver:
    save = loop.saver(
      small_steps.CONFIG, tmp_path, saver, feed, guard.are_finite
    )
    with pytest.raises(TrainingError, match="step 3 are not finite, so it was"):
      save(3, bad, None)
  assert not list((tmp_path / "checkpoints").iterdir())
