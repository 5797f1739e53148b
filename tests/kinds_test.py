"""Every kind of model learns, resumes and decodes by the same code.

But for UltraMem itself, of which train_test and model_test show it.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import ablation
from ultramem_jax import data, testing
from ultramem_jax.model import Transformer
from ultramem_jax.runs import checkpoint
from ultramem_jax.serve import generate
from ultramem_jax.testing import assert_close
from ultramem_jax.train.program import TrainProgram


def memory(settings):
  return {f"model__memory__{name}": value for name, value in settings.items()}


PKM = memory(ablation.ROWS["pkm"])
ONE_BLOCK = {"model__num_layers": 1, "model__memory__spans": "1:1"}
SMALL_MEMORY = {
  **ONE_BLOCK,
  "model__memory__num_keys": 16,
  "model__memory__key_dim": 8,
  "model__memory__top_m": 4,
}
KINDS = {
  "dense": {**ONE_BLOCK, "model__memory__kind": "none"},
  "moe": {
    **ONE_BLOCK,
    "model__memory__kind": "none",
    "model__moe__num_experts": 4,
    "model__moe__expert_dim": 32,
  },
  "pkm": {**PKM, **SMALL_MEMORY, "model__memory__value_dim": 32},
  "peer": {
    **PKM,
    **SMALL_MEMORY,
    "model__memory__kind": "peer",
    "model__memory__value_dim": 32,
  },
  "memory_plus": {**ONE_BLOCK, "model__memory__kind": "memory_plus"},
  "ultramem_v2": {
    "model__memory__kind": "ultramem_v2",
    "model__memory__spans": "1:1/2:2",
    "model__memory__pre_value_dim": 4,
  },
}
STEPS, SAVED = 120, 80


def run(config, train_step, state, batches, steps):
  losses = []
  for _ in range(steps):
    state, metrics = train_step(state, next(batches))
    losses.append(metrics["loss"])
  return state, np.array(losses)


@pytest.mark.parametrize("kind", KINDS)
def test_learns_resumes_and_decodes(kind, tmp_path):
  """120 steps on the embedded corpus, resumed bit for bit at step 80."""
  config = testing.small_config(
    model__embed_dim=32,
    data__seq_len=32,
    steps=STEPS,
    data__prefetch=0,
    optim__learning_rate=1e-2,
    **KINDS[kind],
  )
  lanes = range(config.batch_size)
  train_step = TrainProgram(config)
  corpus = data.open(config)
  batches = corpus.train(lanes)
  state = testing.random_state(config)
  state, before = run(config, train_step, state, batches, SAVED)
  with checkpoint.Checkpointer(tmp_path, keep=1) as checkpointer:
    checkpointer.save(SAVED, state.to_items(), batches.get_state())
  state, after = run(config, train_step, state, batches, STEPS - SAVED)
  # A model that knew only how often each byte occurs would stay near 3.3.
  assert before[:10].mean() > 4 and after[-20:].mean() < 3

  with checkpoint.Checkpointer(tmp_path, keep=1) as checkpointer:
    restored = checkpointer.restore_latest(train_step.state.to_items())
  batches = corpus.train(lanes)
  batches.set_state(restored.data_state)
  resumed, losses = run(
    config,
    train_step,
    train_step.state_from(restored.items),
    batches,
    STEPS - SAVED,
  )
  np.testing.assert_array_equal(losses, after)
  jax.tree.map(np.testing.assert_array_equal, resumed, state)

  model = Transformer(config.model)
  variables = state.variables()
  tokens_BT = next(batches)["tokens"][:, :12]
  cache = generate.init_cache(model, len(tokens_BT), 12)
  decode = jax.jit(functools.partial(generate.apply_cached, model, variables))
  ones_BT = np.ones_like(tokens_BT[:, :1])
  logits = []
  for position in range(12):
    here = slice(position, position + 1)
    cache, logits_BV = decode(
      cache, tokens_BT[:, here], ones_BT, position * ones_BT
    )
    logits.append(logits_BV)
  assert_close(jnp.stack(logits, 1), jax.jit(model.apply)(variables, tokens_BT))
