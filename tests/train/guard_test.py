"""Steps that would harm a run are skipped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import small_steps
from ultramem_jax import testing
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.settings.guard import GuardConfig
from ultramem_jax.tools import training
from ultramem_jax.train import guard, skips

NAN, INF = float("nan"), float("inf")
DENSE = small_steps.CONFIG
SPARSE = small_steps.SPARSE


def floats(*trees):
  leaves = jax.tree.leaves(trees)
  return [x for x in leaves if jnp.issubdtype(x.dtype, jnp.floating)]


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("weight", [NAN, INF])
def test_a_step_that_is_not_finite_changes_nothing_learned(config, weight):
  before, _ = small_steps.first_step(config)
  batch = small_steps.make_batch(config, seed=1)
  bad = {**batch, "weights": batch["weights"].at[0, 0].set(weight)}
  after, metrics = small_steps.train_step(before, bad, config)
  assert not np.isfinite(metrics["loss"])
  assert (metrics["skipped_steps"], metrics["skips_in_a_row"]) == (1, 1)
  learned = lambda state: floats(state.params, state.tables, state.opt_state)
  small_steps.assert_same_bits(learned(after), learned(before))
  small_steps.assert_same_bits(after.usage, before.usage)
  assert after.step == 2
  # The next step counts as the third, and is taken.
  third, metrics = small_steps.train_step(after, batch, config)
  assert (metrics["skipped_steps"], metrics["skips_in_a_row"]) == (1, 0)
  assert np.isfinite(metrics["loss"]) and third.step == 3
  assert all(np.isfinite(x).all() for x in learned(third))
  assert small_steps.differ(learned(third)[0], learned(after)[0])


def judged(steps, spike=0.0):
  """(taken, skipped, in_a_row) after each step of a (loss, norm)."""
  state, results = guard.new_guard(), []
  judge = jax.jit(guard.judge, static_argnums=4)
  for step, (loss, norm) in enumerate(steps, 1):
    taken, state = judge(state, step, loss, norm, GuardConfig(spike=spike))
    results.append((bool(taken), int(state.skipped), int(state.in_a_row)))
  return results


@pytest.mark.parametrize(
  "bad", [(NAN, 1.0), (1.0, NAN), (INF, 1.0), (1.0, INF), (-INF, 1.0)]
)
def test_loss_and_gradient_must_be_finite(bad):
  assert judged([(1.0, 1.0), bad, bad, (1.0, 9e9), bad]) == [
    (True, 0, 0),
    (False, 1, 1),
    (False, 2, 2),
    (True, 2, 0),
    (False, 3, 1),
  ]


def test_spikes_are_told_from_the_mean_of_norms():
  quiet = [(1.0, 1.0 + 0.5 * (n % 2)) for n in range(guard.KNOWN_AFTER)]
  # Before the mean is known nothing is a spike; then three times 1.25 is.
  early = [quiet[0], (1.0, 50.0)]
  assert all(taken for taken, *_ in judged(early + quiet[:-2], spike=3.0))
  later = [(1.0, 3.6), (1.0, 4.1), (1.0, 100.0), (1.0, 4.2), (1.0, 1.0)]
  # What was skipped does not raise the mean.
  assert judged(quiet + later, spike=3.0)[-5:] == [
    (True, 0, 0),
    (False, 1, 1),
    (False, 2, 2),
    (False, 3, 3),
    (True, 3, 0),
  ]
  assert all(taken for taken, *_ in judged(quiet + later))


@pytest.mark.parametrize("bits", [0x7FC0, 0x7F80, 0xFF80])
def test_numbers_of_every_form_are_looked_at(bits):
  good = {"a": jnp.ones(3), "b": jnp.arange(4), "c": jnp.zeros(2, jnp.uint16)}
  assert guard.are_finite(good)
  assert not guard.are_finite({**good, "a": jnp.array([1.0, NAN])})
  assert not guard.are_finite({**good, "c": jnp.array([0, bits], jnp.uint16)})


@pytest.mark.parametrize(
  ("values", "message"),
  [
    ({"spike": 1.0}, "guard.spike = 1.0: must be 0"),
    ({"spike": -2.0}, "guard.spike = -2.0: must be 0"),
    ({"max_skips": 0}, "guard.max_skips = 0: must be at least 1"),
    ({"rollbacks": -1}, "guard.rollbacks = -1: must be at least 0"),
  ],
)
def test_settings(values, message):
  with pytest.raises(ConfigError, match=message):
    GuardConfig(**values)


@pytest.mark.parametrize(("is_stopping", "attempts"), [(False, 3), (True, 1)])
def test_a_run_goes_back_as_often_as_asked_unless_it_is_to_stop(
  is_stopping, attempts, monkeypatch
):
  """In place of each training stands the error that ends it."""
  states = []

  def train_once(config, workdir, profiled, accepted, data_state):
    states.append(data_state)
    error = skips.TooManySkips("too many", len(states))
    error.is_stopping = is_stopping
    raise error

  monkeypatch.setattr(training, "train_once", train_once)
  config = testing.small_config(guard__rollbacks=2)
  if is_stopping:
    assert training.train(config, "no/such") is None
  else:
    with pytest.raises(skips.TooManySkips):
      training.train(config, "no/such")
  assert states == [None, 1, 2][:attempts]
