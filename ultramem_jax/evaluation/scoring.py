"""Log-likelihoods of texts, and continuations that stop at a string, batched.

A text is scored as the beginning of a document: bos comes before it, as in
training (GPT-NeoX's tokenizer uses its end of document for that), and no eos
after it. A text longer than the model's `data.seq_len` loses its beginning, and
bos with it, like the rest of a long document in training.
"""

import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import tqdm

from ultramem_jax import data
from ultramem_jax.data.tokenizer import Tokenizer, encode_prompt, new_text
from ultramem_jax.model import Transformer
from ultramem_jax.serve import generate
from ultramem_jax.serve import prepare as prepare_lib
from ultramem_jax.serve.load import TrainedModel
from ultramem_jax.settings.sampling import Sampling
from ultramem_jax.train import losses, sharding

# Sequences are padded to SHORTEST times a power of 2, so that few lengths are
# compiled.
SHORTEST = 32


class Window(NamedTuple):
  """Tokens, the last `scored` of which are predicted from those before."""

  tokens_T: np.ndarray
  scored: int


def encode_pair(
  tokenizer: Tokenizer, context: str, continuation: str
) -> tuple[np.ndarray, np.ndarray]:
  """Encodes a context and the text that continues it.

  The rules are those of lm-evaluation-harness for causal models. White space at
  the end of the context moves to the continuation. The two are encoded as one
  text, and its tokens beyond the number that the context has by itself are the
  continuation. If a token reaches across the border, so that there are none,
  the continuation is encoded by itself.

  Returns:
    (context_T, continuation_T), int32; the context begins with bos.
  """
  stripped = context.rstrip()
  continuation = context[len(stripped) :] + continuation
  context_T = tokenizer.encode(stripped)
  continuation_T = tokenizer.encode(stripped + continuation)[len(context_T) :]
  if not len(continuation_T):
    continuation_T = tokenizer.encode(continuation)
  return encode_prompt(tokenizer, stripped), continuation_T


def windows(
  context_T: np.ndarray, continuation_T: np.ndarray, length: int
) -> list[Window]:
  """Makes windows that together score each token of a continuation once.

  A window has up to `length` inputs: a long context is cut from the left. A
  continuation longer than a window is scored in several windows, and the last
  of them is full, too.

  Args:
    context_T: [T] int32, at least one token.
    continuation_T: [T] int32, the tokens to score, any number.
    length: the largest number of inputs of the model.
  Returns:
    The windows, in the order of the tokens they score.
  """
  tokens_T = np.append(context_T, continuation_T)
  found = []
  for start in range(len(context_T), len(tokens_T), length):
    end = min(start + length, len(tokens_T))
    begin = max(0, end - 1 - length)
    found.append(Window(tokens_T[begin:end], end - start))
  return found


def batches(
  lengths: Sequence[int], longest: int, batch_size: int
) -> Iterator[tuple[list[int], int, int]]:
  """Groups sequences of similar length, the longest first, in few shapes.

  A width is SHORTEST times a power of 2, or longest. The number of rows is
  batch_size times a power of 2, as many as the sequences of a width need, but a
  batch has at most batch_size * longest positions.

  Args:
    lengths: the length of each sequence, at most longest.
    longest: the largest width.
    batch_size: the number of rows of that width.
  Yields:
    (indices, width, rows): the indices of up to rows sequences, and the shape
    of their batch.
  """

  def width_of(index):
    return min(longest, SHORTEST * _power_of_2(lengths[index] / SHORTEST))

  order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
  for width, group in itertools.groupby(order, key=width_of):
    group = list(group)
    needed = _power_of_2(len(group) / batch_size)
    rows = batch_size * min(longest // width, needed)
    for start in range(0, len(group), rows):
      yield group[start : start + rows], width, rows


def _power_of_2(least: float) -> int:
  """Returns the smallest power of 2 that is at least 1 and at least `least`."""
  return 1 << max(0, math.ceil(least) - 1).bit_length()


def score_step(
  model: Transformer,
  variables: Any,
  tokens_BT: jax.Array,
  segment_BT: jax.Array,
) -> tuple[jax.Array, jax.Array]:
  """Computes the losses of next tokens, and whether each is the likeliest.

  Args:
    model, variables: logits_BTV = model.apply(variables, tokens_BT).
    tokens_BT: [B, T + 1] int32, inputs and targets.
    segment_BT: [B, T] int32, 1 where there is an input, 0 on padding.
  Returns:
    (loss_BT float32 in nats, greedy_BT bool), both [B, T].
  """
  logits_BTV: Any = model.apply(variables, tokens_BT[:, :-1], segment_BT)
  targets_BT = tokens_BT[:, 1:]
  loss_BT, _ = losses.token_losses(logits_BTV, targets_BT)
  return loss_BT, logits_BTV.argmax(-1) == targets_BT


def before_stop(text: str, stops: Sequence[str]) -> str:
  """Returns the part of a text before the first stop string in it."""
  pattern = "|".join(re.escape(stop) for stop in stops if stop)
  return re.split(pattern, text, maxsplit=1)[0] if pattern else text


class Scorer:
  """Scores and continues texts with a trained model, on its mesh.

  Every process must be given the same texts.

  Args:
    run: from `load.load`. A batch holds batch_size sequences of data.seq_len
      tokens, or as many tokens in shorter sequences.
  Attributes:
    cut_contexts: how many contexts lost their beginning, since they did not fit
      into data.seq_len.
    shortened: how many texts were continued by data.seq_len / 2 tokens at most,
      since more were asked for.
  """

  def __init__(self, run: TrainedModel):
    self.cut_contexts = self.shortened = 0
    self._run = run
    self._tokenizer = data.open(run.config).tokenizer
    self._model, self._variables = prepare_lib.prepare(run.model, run.variables)
    self._score = jax.jit(
      functools.partial(score_step, self._model),
      out_shardings=sharding.replicated(run.layout.mesh),
    )

  def _batches(
    self, lengths: Sequence[int], unit: str
  ) -> Iterator[tuple[list[int], int, int]]:
    """Yields `batches`, with a progress bar of the sequences done."""
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
        empty context the score is that of a whole document without its eos.
    Returns:
      For each pair the log-likelihood of the continuation in nats, and whether
      each of its tokens is the likeliest; (0, True) if it is empty.
    """
    length = self._run.config.data.seq_len
    encoded = [encode_pair(self._tokenizer, *pair) for pair in pairs]
    of_pairs = [windows(*pair, length) for pair in encoded]
    for (context_T, _), found in zip(encoded, of_pairs, strict=True):
      if found:
        first_T, scored = found[0]
        self.cut_contexts += len(first_T) - scored < len(context_T)
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
    """Returns `log_likelihoods` of the scored tokens of each window."""
    scores = [(0.0, True)] * len(given)
    lengths = [len(window.tokens_T) - 1 for window in given]
    for indices, width, rows in self._batches(lengths, "window"):
      tokens_BT = np.zeros((rows, width + 1), np.int32)
      segment_BT = np.zeros((rows, width), np.int32)
      for row, index in enumerate(indices):
        tokens_BT[row, : lengths[index] + 1] = given[index].tokens_T
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
    self, contexts: Sequence[str], stops: Sequence[str], sampling: Sampling
  ) -> list[str]:
    """Continues texts up to a stop string, eos, or a number of tokens.

    Args:
      contexts: texts; they are cut from the left, so that the new tokens fit
        into data.seq_len.
      stops: a text ends before the first of these strings that appears, or of
        these special tokens.
      sampling: how tokens are drawn; generation is limited to data.seq_len / 2
        tokens.
    Returns:
      The new texts.
    """
    tokenizer, length = self._tokenizer, self._run.config.data.seq_len
    num_tokens = min(sampling.num_tokens, length // 2)
    if num_tokens < sampling.num_tokens:
      self.shortened += len(contexts)
    sampling = dataclasses.replace(sampling, num_tokens=num_tokens)
    whole = [encode_prompt(tokenizer, context) for context in contexts]
    prompts = [prompt_T[num_tokens - length :] for prompt_T in whole]
    pairs = zip(whole, prompts, strict=True)
    self.cut_contexts += sum(len(one) > len(other) for one, other in pairs)
    texts = [""] * len(prompts)
    lengths = [len(prompt) + num_tokens for prompt in prompts]
    for number, (indices, width, rows) in enumerate(
      self._batches(lengths, "text")
    ):
      # Pads with the last prompt, because each batch size compiles separately.
      padded = indices + indices[-1:] * (rows - len(indices))
      key = jax.random.fold_in(jax.random.key(0), number)
      new = self._continue(
        [prompts[i] for i in padded], stops, sampling, key, width - num_tokens
      )
      for index, text in zip(indices, new, strict=False):
        texts[index] = text
    return texts

  def _continue(
    self,
    prompts: Sequence[np.ndarray],
    stops: Sequence[str],
    sampling: Sampling,
    key: jax.Array,
    length: int,
  ) -> list[str]:
    """Continues a batch of prompts, padded to a length; returns new texts."""

    # Texts show no special tokens.
    specials = self._tokenizer.special_names
    ends = [number for number, name in specials.items() if name in stops]

    def until_end(tokens_T: np.ndarray) -> np.ndarray:
      (places,) = np.isin(tokens_T, ends).nonzero()
      return tokens_T[: places[0]] if places.size else tokens_T

    def written(made: Sequence[np.ndarray]) -> list[str]:
      return [
        new_text(
          self._tokenizer, prompt_T.tolist(), until_end(tokens_T).tolist()
        )
        for prompt_T, tokens_T in zip(prompts, made, strict=True)
      ]

    def finished(made: Sequence[np.ndarray]) -> list[bool]:
      return [
        len(until_end(tokens_T)) < len(tokens_T)
        or before_stop(text, stops) != text
        for tokens_T, text in zip(made, written(made), strict=True)
      ]

    made = generate.generate(
      self._model,
      self._variables,
      prompts,
      sampling,
      key,
      eos_id=self._tokenizer.eos_id,
      padded_length=length,
      finished=finished,
    )
    return [before_stop(text, stops) for text in written(made)]
