"""Batches for training and validation.

Training: row i of every batch is lane i, which packs the documents that its
lane of the source yields. A process makes the rows of its own devices, so
the global batch does not depend on the number of processes, and the state,
kept per lane, resumes under another number.

Validation: the split once, in order, packed as one stream of rows.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

from ultramem_jax.data import packing, sources
from ultramem_jax.data import tokenizer as tokenizer_lib
from ultramem_jax.data.packing import Batch
from ultramem_jax.settings.config import Config

State = dict[str, Any]


class TrainBatches:
  """Endless training batches, resumable; made by `train_batches`."""

  def __init__(self, lanes: dict[str, packing.Lane], seq_len: int, pad_id: int):
    self._lanes, self._seq_len, self._pad_id = lanes, seq_len, pad_id

  def __iter__(self) -> "TrainBatches":
    return self

  def __next__(self) -> Batch:
    stream = packing.empty_stream(
      len(self._lanes), self._seq_len, self._pad_id, with_bytes=False
    )
    for row, lane in enumerate(self._lanes.values()):
      lane.fill(stream, row)
    return packing.to_batch(stream)

  def get_state(self) -> State:
    """Where the next batch begins: {lane: state}, fit for JSON."""
    return {name: lane.get_state() for name, lane in self._lanes.items()}

  def set_state(self, state: State) -> None:
    """Goes to where a state was taken; it may hold further lanes.

    Raises:
      ValueError: the state lacks one of these lanes.
    """
    missing = [name for name in self._lanes if name not in state]
    if missing:
      raise ValueError(
        f"the data state lacks {len(missing)} lanes, such as {missing[0]}: "
        "it was saved with a smaller batch_size, or is not whole"
      )
    for name, lane in self._lanes.items():
      lane.set_state(state[name])

  def close(self) -> None:
    """Does nothing; `Prefetch` has something to release."""


class Prefetch:
  """Makes batches ahead in a thread; otherwise as the TrainBatches it wraps.

  The state is that of the batch handed out last, whatever is made already.
  """

  def __init__(self, batches: TrainBatches, size: int):
    """Args: batches, from now on used by the thread alone; size, at least 1."""
    self._batches, self._size = batches, size
    self._state = batches.get_state()
    self._ahead = collections.deque()
    # At exit Python waits for what a pool has begun: no thread is killed in
    # the middle of a read, and an iterator left open does no harm.
    self._pool = futures.ThreadPoolExecutor(1, "batches")

  def __iter__(self) -> "Prefetch":
    return self

  def __next__(self) -> Batch:
    while len(self._ahead) < self._size:
      self._ahead.append(self._pool.submit(self._make))
    try:
      batch, self._state = self._ahead[0].result()
    except Exception:
      # Later batches were made from lanes that the error left half-way.
      self.set_state(self._state)
      raise
    self._ahead.popleft()
    self._ahead.append(self._pool.submit(self._make))
    return batch

  def _make(self) -> tuple[Batch, State]:
    return next(self._batches), self._batches.get_state()

  def get_state(self) -> State:
    """As of `TrainBatches`."""
    return self._state

  def set_state(self, state: State) -> None:
    """As of `TrainBatches`; what was made ahead is dropped."""
    self._drop()
    self._batches.set_state(state)
    self._state = self._batches.get_state()

  def close(self) -> None:
    """Stops the thread; no batch can be asked for afterwards."""
    self._drop()
    self._pool.shutdown()

  def _drop(self) -> None:
    for future in self._ahead:
      future.cancel()
    futures.wait(self._ahead)
    self._ahead.clear()


class ValidBatches:
  """The validation split, once per iteration; made by `valid_batches`."""

  def __init__(self, config: Config, lanes: Sequence[int], source: Any):
    """Args: config; the rows of this process; the split to read."""
    self._config, self._lanes, self._source = config, list(lanes), source
    self._tokenizer = _tokenizer(config)

  def __iter__(self) -> Iterator[Batch]:
    c = self._config
    packer = packing.Packer(
      self._source.documents(), self._tokenizer, c.data.packing
    )
    for count in itertools.count(1):
      stream = packing.empty_stream(
        c.batch_size, c.data.seq_len, self._tokenizer.pad_id, with_bytes=True
      )
      # Every process packs every row, and so ends at the same batch.
      filled = [packer.fill(stream, row) for row in range(c.batch_size)]
      if not any(filled):
        return
      yield packing.to_batch({k: v[self._lanes] for k, v in stream.items()})
      if count == c.eval_batches or not all(filled):
        return


def train_batches(
  config: Config, lanes: Sequence[int]
) -> TrainBatches | Prefetch:
  """Endless training batches of the rows in lanes.

  Args:
    config: the run; uses data, batch_size, seed, model.vocab_size.
    lanes: rows of the global batch that this process holds, ascending, within
      range(batch_size).
  Returns:
    An iterator of dicts, each array [len(lanes), seq_len], int32 but for
    weights, float32:
      tokens: inputs.
      targets: the token after each input.
      weights: 1 where the target counts; 0 on padding and on a target that
        begins a document.
      segments: the document within the row, from 1; 0 = padding; all 1 with
        packing = "concat".
      positions: within the segment, from 0; within the row with "concat".
    It has `get_state()`, fit for JSON, `set_state(state)` and `close()`.
  Raises:
    ConfigError: of the source, the tokenizer or model.vocab_size.
  """
  tokenizer = _tokenizer(config)
  source = sources.load(config.data, "train")
  documents = source.lanes(lanes, config.batch_size, config.seed)
  packers = {
    str(lane): packing.Lane(texts, tokenizer, config.data.packing)
    for lane, texts in zip(lanes, documents, strict=True)
  }
  batches = TrainBatches(packers, config.data.seq_len, tokenizer.pad_id)
  prefetch = config.data.prefetch
  return Prefetch(batches, prefetch) if prefetch else batches


def valid_batches(config: Config, lanes: Sequence[int]) -> ValidBatches:
  """Batches that hold the validation split once, in order.

  Args:
    config: the run; uses data, batch_size, eval_batches, model.vocab_size.
    lanes: as of `train_batches`.
  Returns:
    An iterable, the same at every iteration, of dicts as of `train_batches`
    and bytes: [len(lanes), seq_len] int32, the UTF-8 bytes of text that a
    target stands for; their sum over a document is its size. The last batch
    is filled up with padding. All processes see the same number of batches.
  Raises:
    ConfigError: as of `train_batches`.
  """
  return ValidBatches(config, lanes, sources.load(config.data, "valid"))


def _tokenizer(config: Config) -> tokenizer_lib.Tokenizer:
  """The tokenizer, checked against the model."""
  tokenizer = tokenizer_lib.load(config.data.tokenizer)
  tokenizer_lib.check_vocab(config.model.vocab_size, tokenizer)
  return tokenizer
