"""Checkpoints that outlive kills, full disks and flipped bits.

A save has three parts, the last two in a thread of their own:

  commit  Orbax writes a temporary directory and renames it to the step.
  seal    the sha256 of every file goes to `sha256.json` in that directory.
  prune   older steps go, except the newest `keep` and the best one.

So a kill at any moment leaves the older checkpoints as they were. Where a run
goes on, the first that applies:

  1. The newest sound checkpoint of its workdir. A damaged one is set aside as
     `corrupt-<step>`, with a warning, and the next older one is tried.
  2. Fresh, only if the workdir holds no checkpoint, not even a damaged one.

Sound means that every file has its sealed digest. A step that a kill left
committed but unsealed is sound if it can be read.
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

# Larger arrays are stored in pieces of rows, so that they need not be read
# whole. A C library gives memory of this size back as soon as it is free.
CHUNK_BYTES = 2**26


class _Damaged(Exception):
  """Bytes of a checkpoint were lost or changed."""


@dataclasses.dataclass(frozen=True)
class Restored:
  """A checkpoint in memory.

  Attributes:
    step: at which it was saved.
    items: the pytrees asked for, by name.
    data: the data iterator's state of every lane, of all processes.
    valid_loss: at that step, None if it was not evaluated there.
  """

  step: int
  items: dict[str, Any]
  data: dict[str, Any]
  valid_loss: float | None


def _gather_lanes(data: dict[str, Any]) -> dict[str, Any]:
  """Merges the lanes of all processes, so that each holds them all."""
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
  """Whether flag holds on any process; all get the same answer."""
  if jax.process_count() == 1:
    return flag
  return bool(multihost_utils.process_allgather(np.bool_(flag)).any())


def _arrays(tree: Any) -> dict[str, str]:
  """{"params/w": "float32[4, 4]"} of the leaves of tree."""
  return {
    jax.tree_util.keystr(
      path, simple=True, separator="/"
    ): f"{np.dtype(leaf.dtype)}{list(leaf.shape)}"
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
  }


def _require_same_arrays(
  saved: dict[str, str], items: dict[str, Any], path: os.PathLike
) -> None:
  """Raises TargetError unless these items were saved with these arrays."""
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
      f" ({len(differences)} arrays differ)"
    )


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
  """What shall become of a leaf: without a sharding, on one device."""
  sharding = getattr(leaf, "sharding", None)
  return jax.ShapeDtypeStruct(
    leaf.shape,
    leaf.dtype,
    sharding=sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0]),
  )


def _storage(path, leaf: jax.Array):
  """Orbax's options for storing an array."""
  del path
  options = ocp.options.ArrayOptions.Saving.StorageOptions()
  part = leaf.sharding.shard_shape(leaf.shape)
  size = math.prod(part) * leaf.dtype.itemsize
  least = -(-size // CHUNK_BYTES)
  # Not the parts of a table by columns, nor rows whose number has no divisor
  # near: Orbax would cut them into slivers.
  if least > 1 and part[1:] == leaf.shape[1:] and part[0] == max(part):
    for count in range(least, 16 * least):
      if part[0] % count == 0:
        options.chunk_byte_size = size // count
        break
  return options


def _read(path: pathlib.Path, items: dict[str, Any]) -> Restored:
  """Reads the named items of a step, as they are on the disk."""
  facts = ocp.checkpointables_metadata(path).custom_metadata
  data, valid_loss = facts["data"], facts["valid_loss"]
  # Whoever reads them checks neither shapes nor dtypes.
  _require_same_arrays(facts["arrays"], items, path)
  # Orbax refuses to save a pytree without leaves; it is its own content.
  loaded = {
    name: array_reader.read(path / name, jax.tree.map(_target, tree))
    for name, tree in items.items()
    if jax.tree.leaves(tree)
  }
  return Restored(int(path.name), {**items, **loaded}, data, valid_loss)


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
    # The bytes of a sealed step are those that were saved, so whatever went
    # wrong is no reason to give the step up.
    if sealed:
      raise
    damage = f"{type(error).__name__}: {error}".splitlines()[0][:200]
  if _any_process(bool(damage)):
    raise _Damaged(damage or "see another process")
  return restored


class Checkpointer(contextlib.AbstractContextManager):
  """Saves and restores the checkpoints of the run that owns a workdir.

  Every process of a run makes one and calls each method at the same step; the
  workdir is on a file system that all of them see.

  Args:
    workdir: the run's directory.
    keep: how many of the newest steps stay; the best one stays as well.
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
      # The kernel drops the lock with the process, however it ends.
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
    """Starts to save a step; returns as soon as the arrays may be reused.

    On a CPU that is when they are saved: they are written from where they lie,
    and a step that took them over before would first copy them all. Waits for
    the previous save. Nothing is done if the step is saved already:
    a run has one state at a step.

    Args:
      step: number of optimizer steps done.
      items: pytrees of arrays by name, each restorable without the others.
      data: {lane: state} of this process's lanes; survives JSON unchanged.
      valid_loss: the validation loss at this step, if it was evaluated.
    Returns:
      Whether a save was started.
    Raises:
      TypeError: data would not come back from JSON as it is.
      CheckpointError: the previous save (on a CPU, this one) could not be
        written, for want of room on the disk, say.
    """
    self.wait()
    path = self._root / str(step)
    if _any_process(path.exists()):
      return False
    if json.loads(json.dumps(data)) != data:
      raise TypeError(f"data = {data!r}: must come back from JSON unchanged")
    finite = valid_loss is not None and math.isfinite(valid_loss)
    context = ocp.Context()
    # Compressed, all arrays would be in memory a second time, and parameters
    # hardly become smaller.
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _storage
    with context:
      response = ocp.save_checkpointables_async(
        path,
        {name: tree for name, tree in items.items() if jax.tree.leaves(tree)},
        custom_metadata={
          "arrays": _arrays(items),
          "data": _gather_lanes(data),
          "valid_loss": float(valid_loss) if finite else None,
        },
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
      items: by name, pytrees of `jax.ShapeDtypeStruct` (or arrays) with the
        dtypes and shardings to restore to, on whatever mesh.
    Returns:
      The checkpoint, or None if none was ever committed.
    Raises:
      CheckpointError: there are checkpoints, but every one is damaged.
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
    """Blocks until the last save is committed and sealed; raises its error."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      try:
        pending.result()
      except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
        cause = str(error).splitlines()[0]
        raise CheckpointError(
          f"a checkpoint cannot be written ({cause}); those before it are "
          "whole, and the same command goes on from the newest"
        ) from error

  def close(self) -> None:
    """Waits for the last save and lets others use the workdir."""
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
  """Restores from any run, running or not, without touching its files.

  Args:
    workdir: the run's directory.
    items: as for `Checkpointer.restore_latest`; a part of what was saved will
      do, such as the parameters without the optimizer's state.
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
  choices = {"newest": saved[::-1], "best": [step_dirs.best(root)]}
  for choice in choices.get(step, [step]):
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
