"""Batches for training and validation; `corpus` makes them.

Training: row i of every batch is lane i, which packs the documents that lane i
of the source yields. A process makes the rows of its own devices, so the
global batch does not depend on the number of processes. The state is kept per
lane, so another number of processes can resume from it.

Validation: the split once, in order, packed as one stream of rows.
"""

import collections
import itertools
from collections.abc import Iterator, Sequence
from concurrent import futures
from typing import Any

from ultramem_jax.data import packing
from ultramem_jax.data.documents import Source
from ultramem_jax.data.packing import Batch
from ultramem_jax.data.tokenizer import Tokenizer
from ultramem_jax.settings.config import Config

State = dict[str, Any]


class TrainBatches(Iterator[Batch]):
  """Endless training batches that can be resumed.

  Args:
    lanes: the lane of each row of this process, by the number of the row.
    seq_len: T.
    pad_id: the token that pads.
  """

  def __init__(self, lanes: dict[str, packing.Lane], seq_len: int, pad_id: int):
    self._lanes, self._seq_len, self._pad_id = lanes, seq_len, pad_id

  def __next__(self) -> Batch:
    stream = packing.empty_stream(
      len(self._lanes), self._seq_len, self._pad_id, with_bytes=False
    )
    for row, lane in enumerate(self._lanes.values()):
      lane.fill(stream, row)
    return packing.to_batch(stream)

  def get_state(self) -> State:
    """Returns where the next batch begins: {lane: state}, fit for JSON."""
    return {name: lane.get_state() for name, lane in self._lanes.items()}

  def set_state(self, state: State) -> None:
    """Goes to where a state was taken, which may hold further lanes.

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
    """Does nothing: only `Prefetch` has something to release."""


class Prefetch(Iterator[Batch]):
  """Makes the batches of a TrainBatches ahead of time, in a thread.

  The state is that of the last batch handed out, whatever has been made since.

  Args:
    batches: from now on only the thread may use it.
    size: how many batches are made ahead, at least 1.
  """

  def __init__(self, batches: TrainBatches, size: int):
    self._batches, self._size = batches, size
    self._state = batches.get_state()
    self._ahead = collections.deque()
    # At exit Python waits for what a pool has begun: no thread is killed in
    # the middle of a read, and an iterator that nobody closed does no harm.
    self._pool = futures.ThreadPoolExecutor(1, "batches")

  def __next__(self) -> Batch:
    while len(self._ahead) < self._size:
      self._ahead.append(self._pool.submit(self._make))
    try:
      batch, self._state = self._ahead[0].result()
    except Exception:
      # The error left the lanes half-way, and later batches were made of them.
      self.set_state(self._state)
      raise
    self._ahead.popleft()
    self._ahead.append(self._pool.submit(self._make))
    return batch

  def _make(self) -> tuple[Batch, State]:
    return next(self._batches), self._batches.get_state()

  def get_state(self) -> State:
    """Returns where the next batch begins, as `TrainBatches` does."""
    return self._state

  def set_state(self, state: State) -> None:
    """Goes to where a state was taken; drops what was made ahead."""
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
  """The validation split, once per iteration.

  Args:
    config: the run; uses data, batch_size and eval_batches.
    rows: the rows of the global batch that this process holds.
    source: the split.
    tokenizer: encodes its documents.
  """

  def __init__(
    self,
    config: Config,
    rows: Sequence[int],
    source: Source,
    tokenizer: Tokenizer,
  ):
    self._config, self._rows = config, list(rows)
    self._source, self._tokenizer = source, tokenizer

  def __iter__(self) -> Iterator[Batch]:
    c = self._config
    packer = packing.Packer(self._source.documents(), self._tokenizer, c.data)
    for count in itertools.count(1):
      stream = packing.empty_stream(
        c.batch_size, c.data.seq_len, self._tokenizer.pad_id, with_bytes=True
      )
      # Every process packs every row, so that all end at the same batch.
      filled = [packer.fill(stream, row) for row in range(c.batch_size)]
      if not any(filled):
        return
      yield packing.to_batch({k: v[self._rows] for k, v in stream.items()})
      if count == c.eval_batches or not all(filled):
        return
