"""The loop over training steps, without a model."""

import types

import pytest

import train
from ultramem_jax import testing
from ultramem_jax.settings import errors


@pytest.mark.parametrize("name", ["loss", "gradient_norm"])
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_neither_loss_nor_gradient_may_be_infinite(name, value):
  values = {"loss": 1.0, "gradient_norm": 2.0}
  train.require_finite(values, 7)
  with pytest.raises(
    errors.TrainingError, match=f"{name.replace('_', ' ')} of step 7 is {value}"
  ):
    train.require_finite({**values, name: float(value)}, 7)


def test_a_step_is_recorded_before_it_is_validated_and_saved():
  """The order that makes the log of a resumed run equal an unbroken one's.

  Otherwise it is recorded when the next one has been dispatched.
  """
  config = testing.small_config(
    steps=5, log_every=2, eval_every=3, checkpoint__every=4
  )
  done = []

  class Log:
    def __getattr__(self, name):
      return lambda *arguments: done.append((name, *arguments[:1]))

  def take_step(n, state):
    assert n == state.step + 1
    done.append(("step", n))
    values = {"loss": 1.0, "gradient_norm": 1.0}
    return types.SimpleNamespace(step=n), values

  state, results = train.run_steps(
    config,
    types.SimpleNamespace(step=1),
    take_step,
    report_usage=lambda state: (state, {"coverage": 0.5}),
    validate=lambda state: {"loss": float(state.step)},
    save=lambda n, state, results: done.append(("save", n, results)),
    log=Log(),
  )
  assert (state.step, results) == (5, {"loss": 5.0})
  assert done == [
    ("step", 2),
    ("step", 3),
    ("record_step", 2),
    ("record_validation", 3),
    ("restart_clock", 3),
    ("step", 4),
    ("record_step", 4),
    ("sync",),
    ("save", 4, None),
    ("restart_clock", 4),
    ("step", 5),
    ("record_validation", 5),
    ("sync",),
    ("save", 5, {"loss": 5.0}),
    ("restart_clock", 5),
  ]
