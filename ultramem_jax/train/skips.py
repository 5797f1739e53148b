"""Reports skipped steps, and stops a run that skips too many."""

import io
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ultramem_jax.runs import files
from ultramem_jax.runs import log as log_lib
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import TrainingError
from ultramem_jax.train.loop import Feed

FOLDER = "skipped"
# Tokens of a document that are shown.
SHOWN = 30


class TooManySkips(TrainingError):
  """So many steps in a row were skipped that a run would learn nothing.

  data_state: where the data after them begin.
  is_stopping: whether the run is to stop, so that it does not go back.
  """

  def __init__(self, message: str, data_state: Any):
    super().__init__(message)
    self.data_state = data_state
    self.is_stopping = False


class Skips:
  """Follows the guard of a run.

  Args:
    config: the run.
    workdir: the run's directory.
    feed: has the batches of the last two steps.
    log: shows what was skipped.
    decode: ids -> text, to show what a batch holds.
  """

  def __init__(
    self,
    config: Config,
    workdir: str | os.PathLike,
    feed: Feed,
    log: log_lib.RunLog,
    decode: Callable[[list[int]], str],
  ):
    self._limit = config.guard.max_skips
    self._folder = pathlib.Path(workdir) / FOLDER
    self._feed, self._log, self._decode = feed, log, decode

  def check(self, n: int, values: Any) -> None:
    """Tells if step n was skipped, and keeps its batch.

    Args:
      n: one of the last two steps.
      values: its metrics, on the devices.
    Raises:
      TooManySkips: it was the last of `guard.max_skips` in a row.
    """
    in_a_row = int(jax.device_get(values["skips_in_a_row"]))
    if not in_a_row:
      return
    loss, norm = (float(values[name]) for name in ("loss", "gradient_norm"))
    cause = f"loss {loss:.4g}, gradient norm {norm:.4g}"
    batch = self._feed.latest[n]
    path = self._save(n, batch)
    self._log.note(
      f"step {n} skipped: {cause}; its batch is kept in {path} and begins with "
      f"{self._beginnings(batch)}"
    )
    if in_a_row >= self._limit:
      raise TooManySkips(
        f"{in_a_row} steps in a row were skipped, the last of them step {n} "
        f"({cause}; batch in {path}): lower optim.learning_rate, or set "
        "guard.rollbacks to continue after this part of the data",
        self._feed.data_state,
      )

  def _save(self, n: int, batch: dict[str, np.ndarray]) -> str:
    """Keeps a batch, and returns where; a run goes on without."""
    path = self._folder / f"{n:08d}_{jax.process_index()}.npz"
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **batch)
    try:
      self._folder.mkdir(exist_ok=True)
      files.write_atomically(path, content.getvalue())
    except OSError as error:
      return f"no file ({error})"
    return str(path)

  def _beginnings(self, batch: dict[str, np.ndarray]) -> str:
    """Returns the first words of the batch's first three rows."""
    rows = [self._decode(row_T[:SHOWN].tolist()) for row_T in batch["tokens"]]
    return ", ".join(repr(text) for text in rows[:3])
