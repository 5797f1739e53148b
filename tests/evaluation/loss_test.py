"""Tests of the evaluation's sums, by hand."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ultramem_jax import data, testing
from ultramem_jax.evaluation import loss as loss_lib
from ultramem_jax.settings.errors import DataError
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train import sharding, state, step


def fake_eval_step(variables, batch):
  """Takes the sums from the batch; the "model" scales the losses."""
  scale, shift = variables["params"]["scale"], variables["buffers"]["shift"]
  return {**batch, "loss": batch["loss"] * scale + shift}


def run(batches, scale=1.0, shift=0.0):
  variables = {"params": {"scale": scale}, "buffers": {"shift": shift}}
  return loss_lib.run(fake_eval_step, variables, batches)


def test_numbers_by_hand():
  # 6 ln 2 nats over 2 + 1 tokens that stand for 1 + 3 bytes.
  batches = [
    {"loss": jnp.float32(2 * math.log(2)), "tokens": 2.0, "bytes": 1},
    {"loss": np.float32(4 * math.log(2)), "tokens": 1.0, "bytes": 3},
  ]
  result = run(iter(batches))
  assert result == {
    "loss": pytest.approx(2 * math.log(2)),  # not the mean of the batches'
    "perplexity": pytest.approx(4.0),
    "bits_per_byte": pytest.approx(6 / 4),
    "tokens": 3,
  }
  assert [type(value) for value in result.values()] == [float] * 3 + [int]


def test_model_and_buffers_are_handed_on():
  batch = {"loss": 3.0, "tokens": 2.0, "bytes": 2}
  assert run([batch], scale=2.0, shift=1.0)["loss"] == 3.5


def test_prompts_alone_are_no_validation():
  with pytest.raises(DataError, match="there is nothing to evaluate"):
    run([{"loss": 0.0, "tokens": 0.0, "bytes": 0}])


def test_prompts_alone_are_refused_before_training(tmp_path):
  line = json.dumps({"prompt": "x" * 99, "answer": " y"})
  (tmp_path / "a.jsonl").write_text(line + "\n")
  config = testing.small_config(
    data__source="text",
    data__path=str(tmp_path / "a.jsonl"),
    data__valid_path=str(tmp_path / "a.jsonl"),
    data__records="answers",
    data__packing="segments",
    eval_batches=1,
  )
  layout = sharding.make_layout(config, mesh_lib.make(config))
  variables = state.abstract_state(config, layout).variables()
  with pytest.raises(DataError, match="there is nothing to evaluate"):
    loss_lib.on_validation_split(config, data.open(config), layout, variables)


def test_perplexity_of_a_hopeless_model_is_finite():
  result = run([{"loss": 1e6, "tokens": 1.0, "bytes": 1}])
  assert result["loss"] == 1e6
  assert math.isfinite(result["perplexity"])


def test_many_batches_are_summed_in_double_precision():
  # In float32 the sum would stop growing at 2^24.
  batches = [{"loss": np.float32(2**24), "tokens": 2.0**24, "bytes": 2**24}]
  batches += 100 * [{"loss": np.float32(1), "tokens": 1.0, "bytes": 1}]
  assert run(batches)["tokens"] == 2**24 + 100
  assert run(batches)["loss"] == 1.0


def test_a_uniform_model_of_bytes_needs_log2_v_bits_per_token(tmp_path):
  text = "héllo wörld\n" * 9
  (tmp_path / "valid.txt").write_text(text)
  config = testing.small_config(
    # Evaluation needs no text to train on.
    data__source="text",
    data__valid_path=str(tmp_path / "valid.txt"),
    model__memory__kind="none",
    model__memory__spans="",
    model__num_layers=1,
  )
  state = testing.random_state(config)
  head = jax.tree.map(jnp.zeros_like, state.params["head"])
  variables = state.replace(params={**state.params, "head": head}).variables()
  mesh = mesh_lib.make(config)
  batches = [
    sharding.to_devices(batch, mesh)
    for batch in data.open(config).valid(sharding.process_rows(config, mesh))
  ]
  assert len(batches) > 1
  eval_step = step.jitted(step.eval_step, config)
  result = loss_lib.run(eval_step, variables, batches)
  size = len(text.encode())
  assert size > len(text)
  # Each byte is a target once, and so is the end of the document.
  assert result["tokens"] == size + 1
  vocab = config.model.vocab_size
  assert result["loss"] == pytest.approx(math.log(vocab), rel=1e-6)
  assert result["perplexity"] == pytest.approx(vocab, rel=1e-5)
  assert result["bits_per_byte"] == pytest.approx(
    math.log2(vocab) * (size + 1) / size, rel=1e-6
  )
