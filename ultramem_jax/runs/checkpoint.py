"""Checkpoints that survive kills, full disks and flipped bits.

A save has three parts; a thread of its own does the last two:

  commit  Orbax writes a temporary directory and renames it to the step.
  seal    The sha256 of every file is written to the directory's `sha256.json`.
  prune   Older steps are deleted, except the newest `keep` and the best one.

So a kill at any moment leaves the older checkpoints as they were. A run starts
from the first of these that exists:

  1. The newest sound checkpoint of its workdir. A damaged one is set aside as
     `corrupt-<step>`, with a warning, and the next older one is tried.
  2. The initial state, but only if the workdir holds no checkpoint at all, not
     even a damaged one.

A checkpoint is sound if every file has its sealed digest. A step that a kill
left committed but unsealed is sound if it can be read.
"""

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from ultramem_jax.runs import array_reader, step_dirs
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings.errors import CheckpointError, TargetError

# Larger arrays are stored in chunks of rows, so that they can be read in parts.
# The C library returns memory of this size to the system as soon as it is free.
CHUNK_BYTES = 2**26


class _Damaged(Exception):
  """A checkpoint whose bytes were lost or changed."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint in memory.

  Attributes:
    step: number of optimizer steps done when it was saved.
    items: the requested pytrees, by name.
    data: state of the data iterator, {lane: state} for all processes' lanes.
    valid_loss: validation loss at that step; None: it was not evaluated.
  """

  step: int
  items: dict[str, Any]
  data: dict[str, Any]
  valid_loss: float | None


def _gather_lanes(data: dict[str, Any]) -> dict[str, Any]:
  """Returns the lanes of all processes."""
  if jax.process_count() == 1:
    return data
  own = np.frombuffer(json.dumps(data).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(own.size))
  padded = np.zeros(int(sizes.max()), np.uint8)
  padded[: own.size] = own
  merged = {}
  rows = multihost_utils.process_allgather(padded)
  for row, size in zip(rows, sizes, strict=True):
    merged |= json.loads(bytes(row[:size]))
  return merged


def _any_process(flag: bool) -> bool:
  """Returns whether flag is true on any process."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def _arrays(tree: Any) -> dict[str, str]:
  """Describes the leaves of a tree: {"params/w": "float32[4, 4]"}."""
  return {
    jax.tree_util.keystr(
      path, simple=True, separator="/"
    ): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _require_same_arrays(
  saved: dict[str, str], items: dict[str, Any], path: os.PathLike
) -> None:
  """Raises TargetError if items have other arrays than were saved."""
  held = {
    name: array
    for name, array in saved.items()
    if name.partition("/")[0] in items
  }
  wanted = _arrays(items)
  differences = [
    f"{name} is {held.get(name, 'absent')} there, "
    f"{wanted.get(name, 'absent')} here"
    for name in dict.fromkeys([*wanted, *held])
    if held.get(name) != wanted.get(name)
  ]
  if differences:
    raise TargetError(
      f"checkpoint {path} is of another model: {'; '.join(differences[:3])}"
      f" ({len(differences)} arrays differ). If another version of UltraMem-JAX"
      " wrote it, go on with that version, or use another --workdir"
    )


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
  """Returns what a leaf is restored to: on one device if it has no sharding."""
  sharding = getattr(leaf, "sharding", None)
  return jax.ShapeDtypeStruct(
    leaf.shape,
    leaf.dtype,
    sharding=sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0]),
  )


def _storage(
  key: Any, value: jax.Array
) -> ocp.options.ArrayOptions.Saving.StorageOptions:
  """Returns Orbax's options for storing an array."""
  del key
  options = ocp.options.ArrayOptions.Saving.StorageOptions()
  part = value.sharding.shard_shape(value.shape)
  size = math.prod(part) * value.dtype.itemsize
  least = -(-size // CHUNK_BYTES)
  # Not for arrays that are split by columns, nor for a number of rows without a
  # suitable divisor: Orbax would cut them into slivers.
  if least > 1 and part[1:] == value.shape[1:] and part[0] == max(part):
    for count in range(least, 16 * least):
      if part[0] % count == 0:
        options.chunk_byte_size = size // count
        break
  return options


def _read(path: pathlib.Path, items: dict[str, Any]) -> Restored:
  """Reads the named items of a step from the disk."""
  facts: Any = ocp.checkpointables_metadata(str(path)).custom_metadata
  # The reader validates neither shape nor dtype.
  _require_same_arrays(facts["arrays"], items, path)
  # Orbax cannot save a pytree without leaves; such an item is returned as is.
  loaded = {
    name: array_reader.read(path / name, jax.tree.map(_target, tree))
    for name, tree in items.items()
    if jax.tree.leaves(tree)
  }
  return Restored(
    int(path.name), {**items, **loaded}, facts["data"], facts["valid_loss"]
  )


def _restore(path: pathlib.Path, items: dict[str, Any]) -> Restored:
  """Reads a step; all processes agree on whether it is damaged.

  Raises:
    _Damaged: a digest differs, or an unsealed step cannot be read.
    TargetError: the step is sound, but items are not what it holds.
  """
  sealed, damage = False, ""
  if jax.process_index() == 0:
    sealed, damage = step_dirs.verify(path)
  if _any_process(bool(damage)):
    raise _Damaged(damage or "see process 0")
  sealed = _any_process(sealed)
  restored = None
  try:
    restored = _read(path, items)
  except (TargetError, MemoryError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    # A sealed step has the bytes that were saved, so whatever went wrong is not
    # its fault.
    if sealed:
      raise
    damage = f"{type(error).__name__}: {error}".splitlines()[0][:200]
  damaged = _any_process(bool(damage))
  if restored is None or damaged:
    raise _Damaged(damage or "see another process")
  return restored


class Checkpointer(contextlib.AbstractContextManager):
  """Saves and restores the checkpoints of a run, and locks its workdir.

  Every process of a run makes one and calls each method at the same step. The
  workdir is on a file system that all of them see.

  Args:
    workdir: the run's directory.
    keep: number of newest steps to keep; the best one is kept, too.
  Raises:
    CheckpointError: another process is training in this workdir.
  """

  def __init__(self, workdir: str | os.PathLike, keep: int):
    self._root = pathlib.Path(workdir).absolute() / workdir_lib.CHECKPOINTS_NAME
    self._root.mkdir(parents=True, exist_ok=True)
    self._keep = keep
    self._pending = None
    self._lock = None
    if jax.process_index() == 0:
      # The kernel releases the lock when the process ends, however it ends.
      self._lock = os.open(self._root, os.O_RDONLY)
      try:
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except BlockingIOError as error:
        os.close(self._lock)
        raise CheckpointError(
          f"another process is training in {workdir}: wait for its end or "
          "use another --workdir"
        ) from error
      for pattern in ("*.orbax-checkpoint-tmp*", "*.deleting"):
        for leftover in self._root.glob(pattern):
          shutil.rmtree(leftover)
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "seal")

  def save(
    self,
    step: int,
    items: dict[str, Any],
    data: dict[str, Any],
    valid_loss: float | None = None,
  ) -> bool:
    """Starts to save a step and returns when the arrays may be reused.

    Waits for the previous save first. On a CPU it returns when this save is
    done: the arrays are written from where they are, and a step that took them
    over earlier would have to copy them. Does nothing if the step is saved
    already, because a run has one state at a step.

    Args:
      step: number of optimizer steps done.
      items: pytrees of arrays by name, each restorable without the others.
      data: {lane: state} of this process's lanes, which JSON can represent.
      valid_loss: the validation loss at this step, if it was evaluated.
    Returns:
      Whether a save was started.
    Raises:
      TypeError: data would come back from JSON changed.
      CheckpointError: the previous save (on a CPU, this one) could not be
        written, for example because the disk is full.
    """
    self.wait()
    path = self._root / str(step)
    if _any_process(path.exists()):
      return False
    if json.loads(json.dumps(data)) != data:
      raise TypeError(f"data = {data!r}: must come back from JSON unchanged")
    if valid_loss is not None:
      valid_loss = float(valid_loss) if math.isfinite(valid_loss) else None
    context = ocp.Context()
    # Compression would hold all arrays in memory a second time, and parameters
    # hardly become smaller.
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _storage
    facts: Any = {
      "arrays": _arrays(items),
      "data": _gather_lanes(data),
      "valid_loss": valid_loss,
    }
    with context:
      response = ocp.save_checkpointables_async(
        str(path),
        {name: tree for name, tree in items.items() if jax.tree.leaves(tree)},
        custom_metadata=facts,
      )
    self._pending = self._thread.submit(self._finish, response, path)
    if jax.default_backend() == "cpu":
      self.wait()
    return True

  def _finish(self, response: Any, path: pathlib.Path) -> None:
    response.result()
    if jax.process_index() == 0:
      step_dirs.seal(path)
      step_dirs.prune(self._root, self._keep)

  def restore_latest(self, items: dict[str, Any]) -> Restored | None:
    """Restores the newest sound checkpoint (the list in the module docstring).

    Args:
      items: pytrees by name of `jax.ShapeDtypeStruct` (or arrays) with the
        dtypes and shardings to restore to, on any mesh.
    Returns:
      The checkpoint, or None if none was ever committed.
    Raises:
      CheckpointError: every checkpoint is damaged.
      TargetError: the newest sound one holds other arrays.
    """
    for step in reversed(step_dirs.committed(self._root)):
      path = self._root / str(step)
      try:
        return _restore(path, items)
      except _Damaged as damage:
        if jax.process_index() == 0:
          aside = step_dirs.set_aside(path)
          logging.warning(
            "checkpoint of step %d is damaged (%s): set aside as %s",
            step,
            damage,
            aside.name,
          )
    aside = sorted(path.name for path in self._root.glob("corrupt-*"))
    if aside:
      raise CheckpointError(
        f"every checkpoint in {self._root} is damaged ({', '.join(aside)}):"
        " put back a copy, or use another --workdir to start over"
      )
    return None

  def wait(self) -> None:
    """Waits until the last save is committed and sealed; raises its error."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      try:
        pending.result()
      except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
        cause = str(error).splitlines()[0]
        raise CheckpointError(
          f"a checkpoint cannot be written ({cause}); earlier ones are whole, "
          "and the same command continues from the newest"
        ) from error

  def close(self) -> None:
    """Waits for the last save and unlocks the workdir."""
    try:
      self.wait()
    finally:
      self._thread.shutdown()
      if self._lock is not None:
        os.close(self._lock)
        self._lock = None

  def __exit__(self, *exception) -> None:
    self.close()


def restore(
  workdir: str | os.PathLike, items: dict[str, Any], step: int | str = "newest"
) -> Restored:
  """Restores a checkpoint of a run, running or not, and changes no file.

  Args:
    workdir: the run's directory.
    items: as for `Checkpointer.restore_latest`; a part of what was saved is
      enough, such as the parameters without the optimizer's state.
    step: "newest" (the newest sound one), "best" (least validation loss), or
      the number of a saved step.
  Raises:
    CheckpointError: no such step, or it is damaged.
    TargetError: it holds other arrays.
  """
  root = pathlib.Path(workdir).absolute() / workdir_lib.CHECKPOINTS_NAME
  saved = step_dirs.committed(root)
  if not saved:
    raise CheckpointError(f"{workdir} holds no checkpoint")
  if step == "newest":
    choices = saved[::-1]
  else:
    choices = [step_dirs.best(root) if step == "best" else step]
  for choice in choices:
    if choice not in saved:
      raise CheckpointError(
        f"{workdir} has no checkpoint {step!r}; saved: "
        f"{', '.join(map(str, saved))}"
      )
    try:
      return _restore(root / str(choice), items)
    except _Damaged as damage:
      logging.warning("checkpoint of step %d is damaged (%s)", choice, damage)
  raise CheckpointError(f"checkpoint {step!r} of {workdir} is damaged")
