"""Log-likelihoods of texts, and continuations that stop at a string, batched.

Texts are taken as the beginning of a document: bos stands before them, as it
does in training (with GPT-NeoX's tokenizer that is its end of document), and
no eos after them. What is longer than the model's `data.seq_len` loses its
beginning, bos included, as the rest of a long document does in training.
"""

import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import tqdm

from ultramem_jax import data
from ultramem_jax.data.tokenizer import Tokenizer
from ultramem_jax.model import Transformer
from ultramem_jax.serve import generate
from ultramem_jax.serve import prepare as prepare_lib
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.settings.config import SampleConfig
from ultramem_jax.train import sharding, step

# The shortest length that sequences are padded to; the others are its doubles.
SHORTEST = 32


class Window(NamedTuple):
  """Tokens, of which the last `scored` are predicted from those before."""

  tokens_N: np.ndarray
  scored: int


def encode_pair(
  tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[np.ndarray, np.ndarray]:
  """Tokens of a context, bos first, and of the text that continues it.

  As lm-evaluation-harness does for causal models: white space at the end of the
  context is moved to the continuation, both are encoded as one text, and the
  continuation is what exceeds the length of the context encoded alone. Where
  nothing does, as a token reaches across, the continuation is encoded alone.

  Returns:
    (context_N, continuation_N), int32.
  """
  stripped = context.rstrip()
  continuation = context[len(stripped) :] + continuation
  context_N = tokenizer.encode(stripped)
  continuation_N = tokenizer.encode(stripped + continuation)[len(context_N) :]
  if not len(continuation_N):
    continuation_N = tokenizer.encode(continuation)
  return _with_bos(tokenizer, stripped), continuation_N


def _with_bos(tokenizer, text):
  return np.append(np.int32(tokenizer.bos_id), tokenizer.encode(text))


def windows(
  context_N: np.ndarray, continuation_N: np.ndarray, length: int
) -> list[Window]:
  """Windows that together score each token of a continuation once.

  A window has `length` inputs at most, and as many as there are: a long context
  is cut from the left, and a continuation longer than a window is scored in
  several, the last of which is full too.

  Args:
    context_N: at least one token.
    continuation_N: the tokens to be scored, any number.
    length: inputs of the model.
  """
  tokens_N = np.append(context_N, continuation_N)
  found = []
  for start in range(len(context_N), len(tokens_N), length):
    end = min(start + length, len(tokens_N))
    begin = max(0, end - 1 - length)
    found.append(Window(tokens_N[begin:end], end - start))
  return found


def batches(
  lengths: Sequence[int], longest: int, batch_size: int
) -> Iterator[tuple[list[int], int, int]]:
  """Groups sequences of like length, the longest first, in few shapes.

  Widths are doubles of SHORTEST up to longest. The rows of a width are a double
  of batch_size, as many as its sequences need, but no more than make
  batch_size * longest positions.

  Args:
    lengths: of the sequences, longest at most.
    longest: the largest width.
    batch_size: rows of that width.
  Yields:
    (indices, width, rows): of the sequences, no more than rows of them.
  """

  def width_of(index):
    return min(longest, SHORTEST * _doubled(lengths[index] / SHORTEST))

  order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
  for width, group in itertools.groupby(order, key=width_of):
    group = list(group)
    rows = batch_size * min(longest // width, _doubled(len(group) / batch_size))
    for start in range(0, len(group), rows):
      yield group[start : start + rows], width, rows


def _doubled(least: float) -> int:
  """The smallest power of 2 that is at least least, and 1."""
  return 1 << max(0, math.ceil(least) - 1).bit_length()


def score_step(model: Transformer, variables, tokens_BT, segment_BT):
  """Losses of next tokens, and whether each is the likeliest.

  Args:
    model, variables: logits_BTV = model.apply(variables, tokens_BT).
    tokens_BT: [B, T + 1] int32, inputs and targets.
    segment_BT: [B, T] int32, 1 where there is an input, else 0.
  Returns:
    (loss_BT float32 in nats, greedy_BT bool), [B, T] both.
  """
  logits_BTV = model.apply(variables, tokens_BT[:, :-1], segment_BT)
  targets_BT = tokens_BT[:, 1:]
  loss_BT, _ = step.token_losses(logits_BTV, targets_BT)
  return loss_BT, logits_BTV.argmax(-1) == targets_BT


def before_stop(text: str, stops: Sequence[str]) -> str:
  """The part of a text before the first of the stops in it."""
  pattern = "|".join(re.escape(stop) for stop in stops if stop)
  return re.split(pattern, text, maxsplit=1)[0] if pattern else text


class Scorer:
  """Scores and continues texts with a trained model, on its mesh.

  Of several processes all must be given the same texts.
  """

  def __init__(self, run: TrainedModel):
    """Args: run, of `trained.load`; config.batch_size sequences of seq_len
    tokens, or as many tokens in shorter ones, are a batch."""
    self._run = run
    self._tokenizer = data.open(run.config).tokenizer
    self._variables = prepare_lib.prepare(run.model, run.variables)
    self._score = jax.jit(
      functools.partial(score_step, run.model),
      out_shardings=sharding.replicated(run.layout.mesh),
    )

  def _batches(self, lengths, unit):
    """`batches`, with a bar of the sequences done."""
    config = self._run.config
    with tqdm.tqdm(
      total=len(lengths), unit=unit, disable=jax.process_index() > 0
    ) as bar:
      for batch in batches(lengths, config.data.seq_len, config.batch_size):
        yield batch
        bar.update(len(batch[0]))

  def log_likelihoods(
    self, pairs: Sequence[tuple[str, str]]
  ) -> list[tuple[float, bool]]:
    """Scores continuations of contexts.

    Args:
      pairs: (context, continuation); see `encode_pair` and `windows`. With an
        empty context this is the likelihood of a whole document but its eos.
    Returns:
      For each (log-likelihood of the continuation in nats, whether every token
      of it is the likeliest); (0, True) for an empty one.
    """
    length = self._run.config.data.seq_len
    of_pairs = [
      windows(*encode_pair(self._tokenizer, *pair), length) for pair in pairs
    ]
    scores = iter(self.score_windows(list(itertools.chain(*of_pairs))))
    totals = []
    for found in of_pairs:
      parts = list(itertools.islice(scores, len(found)))
      totals.append(
        (
          sum((score for score, _ in parts), 0.0),
          all(greedy for _, greedy in parts),
        )
      )
    return totals

  def score_windows(self, given: Sequence[Window]) -> list[tuple[float, bool]]:
    """`log_likelihoods` of the scored tokens of windows, in their order."""
    scores = [None] * len(given)
    lengths = [len(window.tokens_N) - 1 for window in given]
    for indices, width, rows in self._batches(lengths, "window"):
      tokens_BT = np.zeros((rows, width + 1), np.int32)
      segment_BT = np.zeros((rows, width), np.int32)
      for row, index in enumerate(indices):
        tokens_BT[row, : lengths[index] + 1] = given[index].tokens_N
        segment_BT[row, : lengths[index]] = 1
      loss_BT, greedy_BT = jax.device_get(
        self._score(self._variables, tokens_BT, segment_BT)
      )
      for row, index in enumerate(indices):
        place = slice(lengths[index] - given[index].scored, lengths[index])
        scores[index] = (
          -float(loss_BT[row, place].sum(dtype=np.float64)),
          bool(greedy_BT[row, place].all()),
        )
    return scores

  def continuations(
    self, contexts: Sequence[str], stops: Sequence[str], sample: SampleConfig
  ) -> list[str]:
    """Continues texts up to a stop string, eos, or a number of tokens.

    Args:
      contexts: texts; cut from the left so that the new tokens have room.
      stops: strings, of which the first that appears ends a text, without it.
      sample: num_tokens, of which half of data.seq_len is the most, and how
        they are drawn; its prompt is not used.
    Returns:
      The new texts.
    """
    tokenizer, length = self._tokenizer, self._run.config.data.seq_len
    num_tokens = min(sample.num_tokens, length // 2)
    prompts = [
      _with_bos(tokenizer, context)[num_tokens - length :]
      for context in contexts
    ]
    texts = [""] * len(prompts)

    def finished(made):
      written = map(tokenizer.decode, made)
      return [before_stop(text, stops) != text for text in written]

    lengths = [len(prompt) + num_tokens for prompt in prompts]
    for number, (indices, width, rows) in enumerate(
      self._batches(lengths, "text")
    ):
      # Filled up with the last: a number of rows is a program.
      filled = indices + indices[-1:] * (rows - len(indices))
      made = generate.generate(
        self._run.model,
        self._variables,
        [prompts[i] for i in filled],
        num_tokens,
        jax.random.fold_in(jax.random.key(0), number),
        temperature=sample.temperature,
        top_k=sample.top_k,
        top_p=sample.top_p,
        stop=tokenizer.eos_id,
        width=width - num_tokens,
        finished=finished,
      )
      for index, tokens_N in zip(indices, made, strict=False):
        texts[index] = before_stop(tokenizer.decode(tokens_N), stops)
    return texts
