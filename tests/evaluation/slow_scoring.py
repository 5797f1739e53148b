"""Scores and continues texts as slowly and plainly as can be.

One sequence at a time, one full forward for each, log-softmax in numpy.
"""

import functools

import jax
import numpy as np

from ultramem_jax import testing
from ultramem_jax.data.tokenizer import ByteTokenizer
from ultramem_jax.model import Transformer
from ultramem_jax.serve import load as load_lib
from ultramem_jax.train import sharding
from ultramem_jax.train import state as state_lib

LENGTH = 40  # the model's
BOS, EOS = ByteTokenizer.bos_id, ByteTokenizer.eos_id


@functools.cache
def run() -> load_lib.TrainedModel:
  """An untrained model of bytes, whose predictions vary."""
  config = testing.small_config(
    data__seq_len=LENGTH,
    batch_size=2,
    model__num_layers=1,
    model__memory__spans="1:1",
  )
  state = jax.jit(lambda: state_lib.init_state(config))()
  variables = {"params": state.params, "buffers": state.buffers}
  layout = sharding.make_layout(config, sharding.make_mesh(config))
  return load_lib.TrainedModel(
    config, 7, Transformer(config.model, layout), variables, layout
  )


@functools.cache
def forward():
  model, variables = run().model, run().variables
  return jax.jit(lambda tokens_BT: model.apply(variables, tokens_BT))


def log_probabilities(tokens):
  """[T, V] float64, of what comes after each of tokens."""
  tokens_T = np.zeros(LENGTH, np.int32)  # causal: what follows does not matter
  tokens_T[: len(tokens)] = tokens
  logits_TV = np.asarray(forward()(tokens_T[None]), np.float64)[0]
  logits_TV = logits_TV[: len(tokens)] - logits_TV.max()
  return logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))


def score(tokens, scored):
  """(log-likelihood, greedy) of the last `scored` of LENGTH + 1 tokens."""
  log_p_TV = log_probabilities(tokens[:-1])[-scored:]
  targets = tokens[-scored:]
  return (
    sum(log_p_TV[i, token] for i, token in enumerate(targets)),
    list(log_p_TV.argmax(1)) == list(targets),
  )


def score_pair(context, continuation):
  """The same of a continuation that fits into a window."""
  tokens = [BOS, *context.encode(), *continuation.encode()]
  return score(tokens[-LENGTH - 1 :], len(continuation.encode()))


def continue_text(context, num_tokens, stop):
  """The likeliest text of num_tokens tokens, up to stop."""
  tokens = [BOS, *context.encode()][num_tokens - LENGTH :]
  first = len(tokens)
  while len(tokens) < first + num_tokens:
    last_V = log_probabilities(tokens)[-1]
    second, best = np.sort(last_V)[-2:]
    assert best - second > 1e-5  # no tie that rounding could decide
    if last_V.argmax() == EOS:
      break
    tokens.append(int(last_V.argmax()))
  text = ByteTokenizer().decode(tokens[first:])
  return text.split(stop)[0] if stop else text
