"""Tests of the training and evaluation steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.train import small_steps
from ultramem_jax.layers import buffers as buffers_lib
from ultramem_jax.model import Transformer
from ultramem_jax.testing import assert_close
from ultramem_jax.train import optim, step
from ultramem_jax.train import state as state_lib

# Few configs, as each is compiled anew.
CONFIG = small_steps.CONFIG
DROPOUT = small_steps.make_config(model__dropout_rate=0.5, accumulation_steps=2)


@functools.cache
def eval_step(config):
  """step.eval_step, jitted."""
  return step.jitted(step.eval_step, config)


@functools.cache
def gradient_fn(config):
  """jax.value_and_grad of the loss in the parameters, jitted."""

  def function(params, buffers, *args, config, layout):
    return jax.value_and_grad(
      lambda params: step.loss_fn(
        {"params": params, "buffers": buffers},
        *args,
        config=config,
        layout=layout,
      ),
      has_aux=True,
    )(params)

  return step.jitted(function, config)


def loss_of(state, batch, config=CONFIG, buffers=None, **changes):
  """The training loss with refreshed buffers, and its auxiliary outputs."""
  if buffers is None:
    buffers = buffers_lib.refresh_buffers(state.params, state.buffers)
  batch = {**batch, **changes}
  params = state.variables()["params"]
  return gradient_fn(config)(
    params, buffers, batch, jax.random.key(0), batch["weights"].sum()
  )[0]


def test_accumulated_step_equals_one_step():
  assert CONFIG.accumulation_steps != small_steps.TWO_PARTS.accumulation_steps
  assert CONFIG.model.dropout_rate == 0
  # The parts hold different numbers of tokens: a mean of means would differ.
  weights = small_steps.make_batch()["weights"].reshape(2, -1).sum(1)
  assert weights[0] != weights[1]
  (whole, metrics), (parts, sums) = (
    small_steps.first_step(CONFIG),
    small_steps.first_step(small_steps.TWO_PARTS),
  )
  assert set(sums) == set(metrics)
  # Means of the parts' means over the tokens that are there, and a deviation.
  monitors = {
    f"memory_0/{name}" for name in ("score_top_1", "score_top_m", "output_std")
  }
  for name in set(metrics) - monitors:
    np.testing.assert_allclose(
      sums[name], metrics[name], rtol=1e-5, err_msg=name
    )
  small_steps.assert_same_bits(parts.usage, whole.usage)
  small_steps.assert_same_bits(parts.buffers, whole.buffers)
  # Adam divides a gradient by its size, so moments are what tells; a second
  # step brings the parameters in.
  assert_close(parts.opt_state, whole.opt_state, tolerance=1e-4)
  batch = small_steps.make_batch(seed=1)
  whole, metrics = small_steps.train_step(whole, batch)
  parts, sums = small_steps.train_step(parts, batch, small_steps.TWO_PARTS)
  np.testing.assert_allclose(sums["loss"], metrics["loss"], rtol=1e-5)
  np.testing.assert_allclose(
    sums["gradient_norm"], metrics["gradient_norm"], rtol=1e-4
  )


def test_losses_equal_their_definitions():
  state, batch = small_steps.first_state(), small_steps.make_batch()
  total, aux = loss_of(state, batch)
  parts = aux["losses"]
  buffers = buffers_lib.refresh_buffers(state.params, state.buffers)
  logits_BTV, _ = small_steps.forward(CONFIG.model)(
    {**state.variables(), "buffers": buffers}, batch
  )
  logits_BTV = np.asarray(logits_BTV, np.float64)
  log_z_BT = np.log(np.exp(logits_BTV).sum(-1))
  loss = z_loss = 0.0
  for b, t in np.argwhere(batch["weights"]):
    loss += log_z_BT[b, t] - logits_BTV[b, t, batch["targets"][b, t]]
    z_loss += CONFIG.optim.z_loss * log_z_BT[b, t] ** 2
  count = float(batch["weights"].sum())
  core_ARR = np.asarray(state.params["memory_0"]["core"]).sum(0)
  second_A = np.linalg.svd(core_ARR, compute_uv=False)[:, 1]
  auxiliary = CONFIG.model.memory.aux_loss_weight * (second_A**2).mean()
  np.testing.assert_allclose(parts["loss"], loss / count, rtol=1e-5)
  np.testing.assert_allclose(parts["z_loss"], z_loss / count, rtol=1e-5)
  np.testing.assert_allclose(parts["auxiliary_loss"], auxiliary, rtol=1e-4)
  np.testing.assert_allclose(total, sum(parts.values()), rtol=1e-6)
  assert all(part > 0 for part in parts.values())
  metrics = small_steps.first_step()[1]
  for name, part in parts.items():
    np.testing.assert_allclose(metrics[name], part, rtol=1e-5)


def test_parts_of_a_batch_add_up():
  state, batch = small_steps.first_state(), small_steps.make_batch()
  buffers = buffers_lib.refresh_buffers(state.params, state.buffers)
  total_weight = batch["weights"].sum()
  halves = [
    gradient_fn(small_steps.TWO_PARTS)(
      state.variables()["params"],
      buffers,
      {k: v[rows] for k, v in batch.items()},
      jax.random.key(0),
      total_weight,
    )[0][0]
    for rows in (slice(2), slice(2, 4))
  ]
  np.testing.assert_allclose(sum(halves), loss_of(state, batch)[0], rtol=1e-6)


def gradient(config, **changes):
  state = small_steps.first_state()
  batch = {**small_steps.make_batch(), **changes}
  buffers = buffers_lib.refresh_buffers(state.params, state.buffers)
  params = state.variables()["params"]
  return gradient_fn(config)(
    params, buffers, batch, jax.random.key(0), batch["weights"].sum()
  )[1]


def test_z_loss_and_auxiliary_loss_enter_the_gradient():
  full = gradient(CONFIG)
  neither = gradient(
    small_steps.make_config(
      optim__z_loss=0.0, model__memory__aux_loss_weight=0.0
    )
  )
  core_ARR = small_steps.first_state().params["memory_0"]["core"].sum(0)
  u_ARR, lambda_AR, t_ARR = np.linalg.svd(core_ARR)
  # d lambda_2^2 / d C = 2 lambda_2 u_2 t_2^T, averaged over heads.
  expected_ARR = (
    CONFIG.model.memory.aux_loss_weight
    / len(lambda_AR)
    * 2
    * lambda_AR[:, 1, None, None]
    * u_ARR[:, :, 1, None]
    * t_ARR[:, None, 1, :]
  )
  batch = small_steps.make_batch()

  def z_loss(params):
    logits_BTV = Transformer(CONFIG.model).apply(
      {"params": params, "buffers": small_steps.first_state().buffers},
      batch["tokens"],
      batch["segments"],
      batch["positions"],
    )
    log_z_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
    mean = (log_z_BT**2 * batch["weights"]).sum() / batch["weights"].sum()
    return CONFIG.optim.z_loss * mean

  of_z_loss = jax.jit(jax.grad(z_loss))(
    small_steps.first_state().variables()["params"]
  )
  difference = jax.tree.map(jnp.subtract, full, neither)
  # Differences of gradients that are larger than they are.
  assert_close(difference["head"], of_z_loss["head"], tolerance=1e-4)
  assert_close(
    difference["memory_0"]["core"] - of_z_loss["memory_0"]["core"],
    np.stack([expected_ARR] * 2),
    tolerance=2e-3,
  )


def test_weight_zero_contributes_nothing():
  batch = small_steps.make_batch()
  absent_BT = batch["weights"] == 0
  other_BT = jnp.where(absent_BT, 255 - batch["targets"], batch["targets"])
  assert small_steps.differ(other_BT, batch["targets"])
  small_steps.assert_same_bits(
    gradient(CONFIG, targets=other_BT), gradient(CONFIG)
  )
  # Nor do the tokens of padding, whatever they are.
  padding_BT = batch["segments"] == 0
  other_BT = jnp.where(padding_BT, 255 - batch["tokens"], batch["tokens"])
  assert small_steps.differ(other_BT, batch["tokens"])
  same, _ = loss_of(small_steps.first_state(), batch, tokens=other_BT)
  np.testing.assert_allclose(
    same, loss_of(small_steps.first_state(), batch)[0], rtol=1e-6
  )


def test_batch_without_weight_leaves_a_finite_state():
  batch = small_steps.make_batch()
  batch["weights"] = jnp.zeros_like(batch["weights"])
  state, metrics = small_steps.train_step(small_steps.first_state(), batch)
  assert metrics["loss"] == 0
  trained = jax.tree.leaves((state.params, state.tables))
  assert all(np.isfinite(x).all() for x in trained)


def test_buffers_are_refreshed_once_from_the_cores_before_the_step(monkeypatch):
  calls = []

  def counted(params, buffers):
    calls.append(1)
    return buffers_lib.refresh_buffers(params, buffers)

  monkeypatch.setattr(step, "refresh_buffers", counted)
  state, batch = (
    small_steps.first_state(small_steps.TWO_PARTS),
    small_steps.make_batch(),
  )
  # Cores far from those of the buffers, with the signs of the buffers turned.
  memory = state.params["memory_0"]
  core = memory["core"].at[:, :, 0, 1].add(1.0)
  params = {**state.params, "memory_0": {**memory, "core": core}}
  turned = jax.tree.map(jnp.negative, state.buffers)
  state = state.replace(params=params, buffers=turned)
  step.jitted(step.model_step, small_steps.TWO_PARTS).eval_shape(state, batch)
  assert len(calls) == 1
  after, metrics = small_steps.train_step(state, batch, small_steps.TWO_PARTS)
  expected = buffers_lib.refresh_buffers(params, turned)
  assert_close(after.buffers, expected)
  assert small_steps.differ(expected, turned)
  for name in ("u", "t"):
    before_AR = np.asarray(turned["memory_0"][name])
    after_AR = np.asarray(after.buffers["memory_0"][name])
    assert ((before_AR * after_AR).sum(-1) > 0.5).all()
  # The forward used the new ones, not those before nor of the other sign.
  stale = [
    turned,
    buffers_lib.refresh_buffers(params, small_steps.first_state().buffers),
  ]
  losses = [
    float(loss_of(state, batch, buffers=buffers)[1]["losses"]["loss"])
    for buffers in (expected, *stale)
  ]
  np.testing.assert_allclose(metrics["loss"], losses[0], rtol=1e-5)
  assert abs(losses[0] - np.array(losses[1:])).min() > 1e-4


def test_evaluation_uses_the_buffers_as_they_are():
  state = small_steps.first_state()
  batch = {**small_steps.make_batch(), "bytes": jnp.full((4, 8), 3, jnp.int32)}
  evaluate, variables = eval_step(CONFIG), state.variables()
  before = jax.device_get(state.buffers)
  sums = evaluate(variables, batch)
  loss = loss_of(state, batch, buffers=state.buffers)[1]["losses"]["loss"]
  count = float(batch["weights"].sum())
  np.testing.assert_allclose(sums["loss"], loss * count, rtol=1e-5)
  assert sums["tokens"] == count and sums["bytes"] == 3 * 4 * 8
  assert set(sums) == {"loss", "tokens", "bytes"}
  turned = jax.tree.map(jnp.negative, state.buffers)
  other = evaluate({**variables, "buffers": turned}, batch)
  assert abs(other["loss"] - sums["loss"]) > 1e-3
  small_steps.assert_same_bits(state.buffers, before)


def test_evaluation_in_parts_sums_the_same():
  batch = {**small_steps.make_batch(), "bytes": jnp.ones((4, 8), jnp.int32)}
  variables = small_steps.first_state().variables()
  whole, parts = (
    eval_step(config)(variables, batch)
    for config in (CONFIG, small_steps.TWO_PARTS)
  )
  assert whole["tokens"] == parts["tokens"] and parts["bytes"] == 32
  np.testing.assert_allclose(whole["loss"], parts["loss"], rtol=1e-6)
  # It holds the logits of a part only.
  temporary = [
    eval_step(config)
    .lower(variables, batch)
    .compile()
    .memory_analysis()
    .temp_size_in_bytes
    for config in (CONFIG, small_steps.TWO_PARTS)
  ]
  assert temporary[1] < temporary[0]


def test_evaluation_has_no_dropout():
  batch = {**small_steps.make_batch(), "bytes": jnp.ones((4, 8), jnp.int32)}
  state = small_steps.first_state(DROPOUT)
  one, other = (
    eval_step(config)(state.variables(), batch) for config in (DROPOUT, CONFIG)
  )
  np.testing.assert_allclose(one["loss"], other["loss"], rtol=1e-6)


def test_same_seed_same_bits():
  def two_steps():
    state = small_steps.first_state(DROPOUT)
    for seed in range(2):
      state, metrics = small_steps.train_step(
        state, small_steps.make_batch(seed=seed), DROPOUT
      )
    return state, metrics

  small_steps.assert_same_bits(two_steps(), two_steps())


def test_dropout_is_drawn_anew_in_every_step_and_part():
  state, batch = small_steps.first_state(DROPOUT), small_steps.make_batch()
  losses = {
    float(
      small_steps.train_step(state.replace(step=jnp.int32(n)), batch, DROPOUT)[
        1
      ]["loss"]
    )
    for n in (0, 1, 2, 0)
  }
  assert len(losses) == 3
  # Two parts, the even rows and the odd ones, with the same rows: their losses
  # differ only by dropout.
  halved = {k: jnp.repeat(v[:2], 2, axis=0) for k, v in batch.items()}
  total = float(small_steps.train_step(state, halved, DROPOUT)[1]["loss"])
  buffers = buffers_lib.refresh_buffers(state.params, state.buffers)
  key = jax.random.fold_in(jax.random.wrap_key_data(state.key), 0)
  one, other = (
    float(
      gradient_fn(DROPOUT)(
        state.variables()["params"],
        buffers,
        {k: v[:2] for k, v in batch.items()},
        jax.random.fold_in(key, index),
        2 * batch["weights"][:2].sum(),
      )[0][1]["losses"]["loss"]
    )
    for index in (0, 1)
  )
  assert one != other
  np.testing.assert_allclose(total, one + other, rtol=1e-5)


def test_learning_rates_are_those_of_the_step():
  _, metrics = small_steps.first_step()
  base = optim.base_schedule(CONFIG.optim, CONFIG.steps)
  assert metrics["learning_rate"] == base(1)
  of_values = optim.value_schedule(CONFIG.optim, CONFIG.steps)
  assert metrics["value_learning_rate"] == of_values(1)
  # Decay apart, the first step of Adam moves a parameter by the rate.
  start, after = (
    state.variables()["params"]
    for state in (small_steps.first_state(), small_steps.first_step()[0])
  )
  for (module, name), rate in (
    (("memory_0", "values"), float(metrics["value_learning_rate"])),
    (("head", "kernel"), float(metrics["learning_rate"])),
  ):
    kept = 1 - rate * CONFIG.optim.weight_decay
    move = after[module][name] - kept * start[module][name]
    assert float(abs(move).max()) == pytest.approx(rate, rel=1e-3)


def test_dense_models_report_nothing_of_a_memory():
  config = small_steps.make_config(
    model__memory__kind="none", model__memory__spans=""
  )
  state = jax.eval_shape(functools.partial(state_lib.init_state, config))
  assert state.usage == state.buffers == state.tables == {}
  _, _, metrics = jax.eval_shape(
    functools.partial(step.model_step, config=config),
    state,
    step.abstract_batch(config),
  )
  assert "value_learning_rate" not in metrics
  assert not any("memory" in name for name in metrics)


def test_losses_fall_on_one_batch():
  state, batch = small_steps.first_state(), small_steps.make_batch()
  losses = []
  for _ in range(30):
    state, metrics = small_steps.train_step(state, batch)
    losses.append(float(metrics["loss"]))
  assert losses[-1] < 0.5 * losses[0]
