"""Scores and continues texts as slowly and plainly as can be."""

import jax
import numpy as np
import pytest

from ultramem_jax import testing
from ultramem_jax.data.tokenizer import ByteTokenizer
from ultramem_jax.model import Transformer
from ultramem_jax.serve import load as load_lib
from ultramem_jax.train import mesh as mesh_lib
from ultramem_jax.train import sharding


@pytest.fixture(scope="session")
def slow():
  """A SlowScorer of an untrained model of bytes, whose predictions vary."""
  return SlowScorer()


class SlowScorer:
  """Runs a full forward of one sequence for each answer.

  Log-softmax is taken in numpy. `run` is the model, `length` its seq_len.
  """

  length = 40
  bos, eos = ByteTokenizer.bos_id, ByteTokenizer.eos_id

  def __init__(self):
    config = testing.small_config(
      data__seq_len=self.length,
      batch_size=2,
      model__num_layers=1,
      model__memory__spans="1:1",
    )
    variables = testing.random_state(config).variables()
    layout = sharding.make_layout(config, mesh_lib.make(config))
    model = Transformer(config.model, layout)
    self.run = load_lib.TrainedModel(config, 7, model, variables, layout)
    self._forward = jax.jit(lambda tokens_BT: model.apply(variables, tokens_BT))

  def log_probabilities(self, tokens):
    """[T, V] float64, of what comes after each of tokens."""
    # The model is causal: what follows the tokens does not matter.
    tokens_T = np.zeros(self.length, np.int32)
    tokens_T[: len(tokens)] = tokens
    logits_TV = np.asarray(self._forward(tokens_T[None]), np.float64)[0]
    logits_TV = logits_TV[: len(tokens)] - logits_TV.max()
    return logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))

  def score(self, tokens, scored):
    """(log-likelihood, greedy) of the last `scored` of length + 1 tokens."""
    log_p_TV = self.log_probabilities(tokens[:-1])[-scored:]
    targets = tokens[-scored:]
    return (
      sum(log_p_TV[i, token] for i, token in enumerate(targets)),
      list(log_p_TV.argmax(1)) == list(targets),
    )

  def score_pair(self, context, continuation):
    """`score` of a continuation that fits into a window."""
    tokens = [self.bos, *context.encode(), *continuation.encode()]
    return self.score(tokens[-self.length - 1 :], len(continuation.encode()))

  def continue_text(self, context, num_tokens, stop):
    """The likeliest text of num_tokens tokens, up to stop."""
    tokens = [self.bos, *context.encode()][num_tokens - self.length :]
    first = len(tokens)
    while len(tokens) < first + num_tokens:
      last_V = self.log_probabilities(tokens)[-1]
      second, best = np.sort(last_V)[-2:]
      assert best - second > 1e-5  # no tie that rounding could decide
      if last_V.argmax() == self.eos:
        break
      tokens.append(int(last_V.argmax()))
    text = ByteTokenizer().decode(tokens[first:])
    return text.split(stop)[0] if stop else text
