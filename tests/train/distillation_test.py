"""Memories that are kept to what their model says without them."""

import jax
import numpy as np
import pytest
from flax import traverse_util

from tests.train import small_steps
from ultramem_jax.layers import buffers as buffers_lib
from ultramem_jax.model import Transformer
from ultramem_jax.settings.errors import ConfigError
from ultramem_jax.testing import assert_close
from ultramem_jax.tools import fit
from ultramem_jax.train import preconditions, step

SHARE = 0.3


def make_config(share=SHARE, **overrides):
  return small_steps.make_config(
    **{
      **small_steps.SPARSE_SETTINGS,
      "optim__trainable": "memory",
      "optim__distillation": share,
      **overrides,
    }
  )


CONFIG = make_config()
DENSE = small_steps.make_config(model__memory__kind="none")


def variables_of(state):
  """Of the model, with the buffers that a step refreshes."""
  variables = state.variables()
  buffers = buffers_lib.refresh_buffers(
    variables["params"], variables["buffers"]
  )
  return {"params": variables["params"], "buffers": buffers}


def teacher_logits(variables, batch):
  """Of a model that was never given a memory."""
  params = {
    name: leaves
    for name, leaves in variables["params"].items()
    if not name.startswith("memory")
  }
  return small_steps.forward(DENSE.model)({"params": params}, batch)[0]


def log_softmax(logits_BTV):
  logits_BTV = np.asarray(logits_BTV, np.float64)
  return logits_BTV - np.log(np.exp(logits_BTV).sum(-1, keepdims=True))


def divergence(config, state, batch):
  """Mean of KL(without || with) over the tokens with weights, in float64."""
  variables = variables_of(state)
  logits_BTV, _ = small_steps.forward(config.model)(variables, batch)
  log_p_BTV = log_softmax(logits_BTV)
  log_q_BTV = log_softmax(teacher_logits(variables, batch))
  kl_BT = (np.exp(log_q_BTV) * (log_q_BTV - log_p_BTV)).sum(-1)
  return np.average(kl_BT, weights=batch["weights"])


def loss_gradients(config, variables, batch):
  """((loss, aux), gradients) of `step.loss_fn` in all parameters."""

  @jax.jit
  def function(params):
    return jax.value_and_grad(
      lambda params: step.loss_fn(
        {**variables, "params": params},
        batch,
        jax.random.key(0),
        batch["weights"].sum(),
        config=config,
      ),
      has_aux=True,
    )(params)

  return function(variables["params"])


def test_the_loss_is_a_share_of_each():
  state, batch = small_steps.first_state(CONFIG), small_steps.make_batch()
  (loss, aux), _ = loss_gradients(CONFIG, variables_of(state), batch)
  parts = aux["losses"]
  kl = divergence(CONFIG, state, batch)
  assert kl > 0.1  # the memory says something
  np.testing.assert_allclose(parts["distillation_loss"], kl, rtol=1e-5)
  expected = (
    (1 - SHARE) * parts["loss"]
    + SHARE * kl
    + parts["z_loss"]
    + parts["auxiliary_loss"]
  )
  np.testing.assert_allclose(loss, expected, rtol=1e-6)
  # The others are those of a run without a teacher.
  plain = loss_gradients(make_config(0.0), variables_of(state), batch)[0]
  assert "distillation_loss" not in plain[1]["losses"]
  for name, part in plain[1]["losses"].items():
    np.testing.assert_allclose(parts[name], part, rtol=1e-6)


def test_gradients_are_those_of_a_slow_reference():
  """In all parameters: none flows through the teacher."""
  config = make_config(1.0, optim__z_loss=0.0)
  state, batch = small_steps.first_state(config), small_steps.make_batch()
  variables = variables_of(state)
  q_BTV = np.exp(log_softmax(teacher_logits(variables, batch)))

  @jax.jit
  @jax.grad
  def expected(params):
    logits_BTV, sown = Transformer(config.model).apply(
      {**variables, "params": params},
      batch["tokens"],
      batch["segments"],
      batch["positions"],
      mutable=["losses"],
    )
    # Up to the entropy of the teacher, which is constant.
    cross_BT = -(q_BTV * jax.nn.log_softmax(logits_BTV)).sum(-1)
    mean = (cross_BT * batch["weights"]).sum() / batch["weights"].sum()
    return mean + sum(jax.tree.leaves(sown["losses"]))

  _, actual = loss_gradients(config, variables, batch)
  assert_close(actual, expected(variables["params"]))


def silent(state):
  """A state whose memory adds nothing, as with output = "zero"."""
  params = traverse_util.flatten_dict(state.params, sep="/")
  params["memory_0/value_projection"] *= 0
  return state.replace(params=traverse_util.unflatten_dict(params, sep="/"))


def test_a_memory_that_adds_nothing_diverges_by_nothing():
  config = make_config(1.0)
  state, batch = (
    silent(small_steps.first_state(config)),
    small_steps.make_batch(),
  )
  _, metrics = small_steps.train_step(state, batch, config)
  # Rounding of log Z, about 6, of which both programs' are subtracted.
  assert abs(metrics["distillation_loss"]) < 1e-5
  assert metrics["loss"] > 1


@pytest.mark.parametrize(
  "overrides", [{"optim__table_update": "dense"}, {"accumulation_steps": 2}]
)
def test_steps_agree_however_they_are_taken(overrides):
  batch = small_steps.make_batch(CONFIG)
  config = make_config(**overrides)
  metrics, expected = (
    small_steps.train_step(small_steps.first_state(c), batch, c)[1]
    for c in (config, CONFIG)
  )
  for name in ("loss", "distillation_loss", "gradient_norm"):
    np.testing.assert_allclose(
      metrics[name], expected[name], rtol=1e-5, err_msg=name
    )


def test_a_distilled_memory_says_what_its_model_says_without_it():
  batch = small_steps.make_batch()
  diverged = {}
  for share in (0.0, 1.0):
    config = make_config(share)
    state = start = small_steps.first_state(config)
    for _ in range(20):
      state, metrics = small_steps.train_step(state, batch, config)
    assert ("distillation_loss" in metrics) == bool(share)
    diverged[share] = divergence(config, state, batch)
  assert diverged[1.0] < divergence(config, start, batch) / 2
  assert diverged[1.0] < diverged[0.0] / 2


@pytest.mark.parametrize(
  ("message", "overrides"),
  [
    (r" = 1\.5: must lie in \[0, 1\]", {"share": 1.5}),
    ("for a model without memory", {"model__memory__kind": "none"}),
    ("would lack MLPs", {"model__memory__replace_mlp": True}),
    (
      "optim.trainable = 'all' trains block_0/attention/key/kernel, ",
      {"optim__trainable": "all"},
    ),
    (
      r"trains block_0/mlp/up/lora_a, block_0/mlp/up/lora_b; 'memory' trains",
      {
        "optim__trainable": "lora_|memory",
        "model__lora__rank": 2,
        "model__lora__targets": "mlp/up",
      },
    ),
  ],
)
def test_what_has_no_teacher_that_stays_is_refused(message, overrides):
  with pytest.raises(ConfigError, match=rf"^optim\.distillation.*{message}"):
    preconditions.require_trainable(make_config(**overrides))


@pytest.mark.parametrize("pattern", ["memory", "memory_.*values", "gating"])
def test_memories_and_gates_are_distilled(pattern):
  preconditions.require_trainable(
    make_config(optim__trainable=pattern, model__memory__gate="input")
  )


def test_the_teacher_takes_memory():
  """What it says, and the probabilities: as many numbers as words, each."""
  with_teacher, without = (
    fit.training_bytes(make_config(share))["activations"]
    for share in (SHARE, 0.0)
  )
  tokens = CONFIG.batch_size * CONFIG.data.seq_len
  assert with_teacher - without == 2 * 4 * tokens * CONFIG.model.vocab_size
