"""Checkpoints that survive kills, full disks and flipped bits.

A save has four parts; a thread of its own does all but the first:

  commit  Orbax writes a temporary directory and renames it to the step.
  open    It is opened again, and forced to the disk.
  seal    The sha256 of every file is written to the directory's `sha256.json`.
  prune   Older steps are deleted, except the newest `keep` and the best one.

So a kill at any moment leaves the older checkpoints as they were. A run starts
from the first of these that exists:

  1. The newest sound checkpoint of its workdir. A damaged one is set aside as
     `corrupt-<step>`, with a warning, and the next older one is tried.
  2. The initial state, but only if the workdir holds no checkpoint at all, not
     even a damaged one.

A checkpoint is sound if every file has its sealed digest. A step that a kill
left committed but unsealed is sound if it can be read. An error of the system,
such as too many open files, is no damage: it ends the start, which may be tried
again. What was set aside is tried again once it has its number as name.
"""

import concurrent.futures
import contextlib
import fcntl
import json
import math
import os
import pathlib
from typing import Any

import jax
import numpy as np
from absl import logging
from orbax.checkpoint import v1 as ocp

from ultramem_jax.runs import array_reader, distributed, step_dirs, step_reader
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.runs.step_dirs import Damaged
from ultramem_jax.runs.step_reader import Restored
from ultramem_jax.settings.errors import CheckpointError

# Larger arrays are stored in chunks of rows, so that they can be read in parts.
# The C library returns memory of this size to the system as soon as it is free.
CHUNK_BYTES = 2**26
TRIAL = ".trial"  # what is saved to see whether it can be


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


class Checkpointer(contextlib.AbstractContextManager):
  """Saves and restores the checkpoints of a run, and locks its workdir.

  Every process of a run makes one and calls each method at the same step. The
  workdir is on a file system that all of them see.

  Args:
    workdir: the run's directory.
    keep: number of newest steps to keep; the best one is kept, too.
  Raises:
    CheckpointError: another process is training in this workdir, or a small
      array cannot be saved there and opened again.
  """

  def __init__(self, workdir: str | os.PathLike, keep: int):
    self._root = pathlib.Path(workdir).absolute() / workdir_lib.CHECKPOINTS_NAME
    workdir_lib.make_folder(self._root)
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
      step_dirs.delete_leftovers(self._root)
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "seal")
    try:
      _try_save(self._root)
    except (OSError, ValueError, RuntimeError) as error:
      self.close()
      raise CheckpointError(
        f"no checkpoint can be saved in {self._root} ({_first_line(error)}): "
        "mend that, or use another --workdir"
      ) from error

  def save(
    self,
    step: int,
    items: dict[str, Any],
    data: dict[str, Any],
    valid_loss: float | None = None,
    validation_due: bool = False,
  ) -> bool:
    """Starts to save a step and returns when the arrays may be reused.

    Waits for the previous save first. On a CPU it returns when this save is
    done: the arrays are written from where they are, and a step that took them
    over earlier would have to copy them. Does nothing if the step is saved
    already, because a run has one state at a step. What else has the step's
    name is set aside.

    Args:
      step: number of optimizer steps done.
      items: pytrees of arrays by name, each restorable without the others.
      data: {lane: state} of this process's lanes, which JSON can represent.
      valid_loss: the validation loss at this step, if it was evaluated.
      validation_due: whether it is to be evaluated when the run goes on;
        `add_loss` adds it then.
    Returns:
      Whether a save was started.
    Raises:
      TypeError: data would come back from JSON changed.
      CheckpointError: the previous save (on a CPU, this one) could not be
        written, for example because the disk is full, or not be opened again;
        or the workdir is gone.
    """
    self.wait()
    path = self._root / str(step)
    if self._is_saved(path):
      return False
    if json.loads(json.dumps(data)) != data:
      raise TypeError(f"data = {data!r}: must come back from JSON unchanged")
    if valid_loss is not None:
      valid_loss = float(valid_loss) if math.isfinite(valid_loss) else None
    facts: Any = {
      "step": step,
      "arrays": step_reader.arrays(items),
      "data": distributed.merged(data),
      "valid_loss": valid_loss,
      "validation_due": validation_due,
    }
    shapes = jax.eval_shape(lambda: items)
    response = _start(path, items, facts)
    self._pending = self._thread.submit(self._finish, response, path, shapes)
    if jax.default_backend() == "cpu":
      self.wait()
    return True

  def _is_saved(self, path: pathlib.Path) -> bool:
    """Whether a step is there; sets aside what else has its name."""
    saved = False
    self._require_place()
    if jax.process_index() == 0 and os.path.lexists(path):
      try:
        step_dirs.verify(path)
        step_dirs.facts(path)
        saved = True
      except Damaged as damage:
        _set_aside(path, damage)
    return distributed.any_process(saved)

  def _finish(self, response: Any, path: pathlib.Path, shapes: Any) -> None:
    response.result()
    if jax.process_index() == 0:
      self._require_place()
      try:
        step_reader.require_readable(path, shapes)
      except (Damaged, OSError, ValueError) as error:
        raise CheckpointError(
          f"checkpoint {path} was written, but cannot be opened again "
          f"({_first_line(error)}); earlier ones are whole"
        ) from error
      step_dirs.flush(path)
      step_dirs.seal(path)
      step_dirs.prune(self._root, int(path.name), self._keep)

  def _require_place(self) -> None:
    """Raises CheckpointError if the directory is no longer where it was."""
    if self._lock is None:
      return
    try:
      here = os.stat(self._root)
    except FileNotFoundError:
      here = None
    if not here or not os.path.samestat(here, os.fstat(self._lock)):
      raise CheckpointError(
        f"{self._root} was deleted, renamed or replaced while the run used it: "
        "put it back, and the same command continues from its newest checkpoint"
      )

  def add_loss(self, step: int, valid_loss: float) -> None:
    """Adds the validation loss that was due when a step was saved."""
    if jax.process_index() == 0:
      loss = float(valid_loss) if math.isfinite(valid_loss) else None
      step_dirs.add_loss(self._root / str(step), loss)

  def restore_latest(self, items: dict[str, Any]) -> Restored | None:
    """Restores the newest sound checkpoint (the list in the module docstring).

    Args:
      items: pytrees by name of `jax.ShapeDtypeStruct` (or arrays) with the
        dtypes and shardings to restore to, on any mesh.
    Returns:
      The checkpoint, or None if none was ever committed. Before the first step,
      at step 0, it may lack items: parameters from elsewhere bring no state of
      an optimizer.
    Raises:
      CheckpointError: every checkpoint is damaged.
      TargetError: the newest sound one holds other arrays.
      OSError: it cannot be read now; nothing is changed.
    """
    for step in reversed(step_dirs.committed(self._root)):
      path = self._root / str(step)
      try:
        return step_reader.read(path, items)
      except Damaged as damage:
        if jax.process_index() == 0:
          _set_aside(path, damage)
    aside = sorted(path.name for path in self._root.glob("corrupt-*"))
    if aside:
      raise CheckpointError(
        f"every checkpoint in {self._root} is damaged ({', '.join(aside)}):"
        " put back a copy, rename one to its number to try it again, or use "
        "another --workdir to start over"
      )
    return None

  def wait(self) -> None:
    """Waits until the last save is committed and sealed; raises its error."""
    if self._pending is not None:
      pending, self._pending = self._pending, None
      try:
        pending.result()
      except (OSError, ValueError) as error:  # TensorStore's are ValueErrors
        raise CheckpointError(
          f"a checkpoint cannot be written ({_first_line(error)}); earlier "
          "ones are whole, and the same command continues from the newest"
        ) from error

  def close(self) -> None:
    """Waits for the last save and unlocks the workdir.

    Raises:
      CheckpointError: of the last save, or the workdir is gone.
    """
    try:
      self.wait()
      self._require_place()
    finally:
      self._thread.shutdown()
      if self._lock is not None:
        os.close(self._lock)
        self._lock = None

  def __exit__(self, *exception) -> None:
    self.close()


def _start(path: pathlib.Path, items: dict[str, Any], facts: Any) -> Any:
  """Starts Orbax's save; returns the response that waits for its commit."""
  context = ocp.Context()
  # Compression would hold all arrays in memory a second time, and parameters
  # hardly become smaller.
  context.array.saving.use_compression = False
  context.array.saving.scoped_storage_options_creator = _storage
  with context:
    return ocp.save_checkpointables_async(
      str(path),
      {name: tree for name, tree in items.items() if jax.tree.leaves(tree)},
      custom_metadata=facts,
    )


def _try_save(root: pathlib.Path) -> None:
  """Saves a small array in a directory, and opens and deletes it again."""
  path = root / TRIAL
  is_first = jax.process_index() == 0
  for leftover in root.glob(f"{TRIAL}*") if is_first else ():
    step_dirs.delete(leftover)
  # On all devices, as those of all processes must have a part of it.
  mesh = jax.sharding.Mesh(jax.devices(), "x")
  places = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  zero = np.zeros(1, np.float32)
  tree = {"x": jax.make_array_from_callback((1,), places, lambda _: zero)}
  _start(path, {"params": tree}, {}).result()
  if is_first:
    array_reader.require_readable(path / "params", tree)
    step_dirs.delete(path)


def _first_line(error: Exception) -> str:
  return str(error).partition("\n")[0][:200]


def _set_aside(path: pathlib.Path, damage: Damaged) -> None:
  aside = step_dirs.set_aside(path)
  logging.warning(
    "checkpoint of step %s is damaged (%s): set aside as %s",
    path.name,
    damage,
    aside.name,
  )


def restore(
  workdir: str | os.PathLike, items: dict[str, Any], step: int | str = "newest"
) -> Restored:
  """Restores a checkpoint of a run, running or not, and changes no file.

  If the run deletes the checkpoint while it is read, the next one is taken.

  Args:
    workdir: the run's directory.
    items: as for `Checkpointer.restore_latest`; a part of what was saved is
      enough, such as the parameters without the optimizer's state.
    step: "newest" (the newest sound one), "best" (least validation loss), or
      the number of a saved step.
  Raises:
    CheckpointError: no such step, or it is damaged.
    TargetError: it holds other arrays.
    OSError: it cannot be read now.
  """
  root = pathlib.Path(workdir).absolute() / workdir_lib.CHECKPOINTS_NAME
  damaged = set()
  while True:
    choice = distributed.of_process_0(_choose(root, step, damaged))
    path = root / str(choice)
    try:
      return step_reader.read(path, items)
    except (Damaged, OSError) as error:
      if not distributed.of_process_0(path.exists()):
        continue
      if isinstance(error, OSError):
        raise
      logging.warning("checkpoint of step %d is damaged (%s)", choice, error)
      damaged.add(choice)


def _choose(root: pathlib.Path, step: int | str, damaged: set[int]) -> int:
  """Returns the step that `restore` is asked for, and that is not damaged."""
  saved = step_dirs.committed(root)
  if not saved:
    raise CheckpointError(f"{root.parent} holds no checkpoint")
  if step == "newest":
    choice = next((x for x in reversed(saved) if x not in damaged), saved[0])
  else:
    choice = step_dirs.best(root) if step == "best" else int(step)
  if choice not in saved:
    raise CheckpointError(
      f"{root.parent} has no checkpoint {step!r}; saved: "
      f"{', '.join(map(str, saved))}"
    )
  if choice in damaged:
    raise CheckpointError(f"checkpoint {step!r} of {root.parent} is damaged")
  return choice
