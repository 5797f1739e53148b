"""Checkpoints that survive kills, full disks and flipped bits.

A save has four parts; a thread of its own does all but the first:

  commit  Orbax writes a temporary directory and renames it to the step.
  open    It is opened again, and forced to the disk.
  seal    The sha256 of every file is written to the directory's `sha256.json`.
  prune   Older steps are deleted, except the newest `keep` and the best one.

Parameters that a run does not train are saved apart, once (`frozen.py`).

So a kill at any moment leaves the older checkpoints as they were. A run starts
from the first of these that exists:

  1. The newest sound checkpoint of its workdir. A damaged one is set aside as
     `corrupt-<step>`, with a warning, and the next older one is tried.
  2. The initial state, but only if the workdir holds no checkpoint at all, not
     even a damaged one.

A checkpoint is sound if every file has its sealed digest. A step that a kill
left committed but unsealed is sound if it can be read, and is sealed by the run
that goes on from it. An error of the system, such as too many open files, is no
damage: it ends the start, which may be tried again. What was set aside is tried
again once it has its number as name.
"""

import concurrent.futures
import contextlib
import json
import math
import os
import pathlib
from typing import Any

import jax
from absl import logging

from ultramem_jax.runs import (
  distributed,
  files,
  frozen,
  step_dirs,
  step_reader,
  step_writer,
)
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.runs.frozen import FrozenError
from ultramem_jax.runs.step_dirs import Damaged
from ultramem_jax.runs.step_reader import Restored
from ultramem_jax.settings.errors import CheckpointError, first_line


class Checkpointer(contextlib.AbstractContextManager):
  """Saves and restores the checkpoints of a run, and locks its workdir.

  Every process of a run makes one and calls each method at the same step. The
  workdir is on a file system that all of them see.

  Args:
    workdir: the run's directory.
    keep: number of newest steps to keep; the best one is kept, too.
  Raises:
    CheckpointError: another process is training in this workdir, processes do
      not share it, or a small array cannot be saved there and opened again.
  """

  def __init__(self, workdir: str | os.PathLike, keep: int):
    self._root = pathlib.Path(workdir).absolute() / workdir_lib.CHECKPOINTS_NAME
    files.make_folder(self._root)
    self._keep = keep
    self._pending = None
    self._store: frozen.Store | None = None  # of what saves leave out
    self._held: frozen.Store | None = None  # that of the restored checkpoint
    self._lock = None
    if jax.process_index() == 0:
      self._lock = workdir_lib.lock(workdir)
      for root in (self._root, frozen.root(self._root.parent)):
        step_dirs.delete_leftovers(root)
    self._thread = concurrent.futures.ThreadPoolExecutor(1, "seal")
    if unseen := distributed.unseen_by(self._root / ".seen_by_all"):
      self.close()
      raise CheckpointError(
        f"processes {unseen} do not see what process 0 writes to "
        f"{self._root.parent}: --workdir must be in a file system that all "
        "processes share"
      )
    try:
      step_writer.try_save(self._root)
    except (OSError, ValueError, RuntimeError) as error:
      self.close()
      raise CheckpointError(
        f"no checkpoint can be saved in {self._root} "
        f"({first_line(error)}): mend that, or use another "
        "--workdir"
      ) from error

  def save(
    self,
    step: int,
    items: dict[str, Any],
    data_state: dict[str, Any],
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
      data_state: {lane: state} of this process's lanes, which JSON can
        represent.
      valid_loss: the validation loss at this step, if it was evaluated.
      validation_due: whether it is to be evaluated when the run goes on;
        `add_loss` adds it then.
    Returns:
      Whether a save was started.
    Raises:
      TypeError: data_state would come back from JSON changed.
      CheckpointError: the previous save (on a CPU, this one) could not be
        written, for example because the disk is full, or not be opened again;
        or the workdir is gone.
    """
    self.wait()
    path = self._root / str(step)
    if self._is_saved(path):
      return False
    if json.loads(json.dumps(data_state)) != data_state:
      raise TypeError(
        f"data_state = {data_state!r}: must come back from JSON unchanged"
      )
    if valid_loss is not None:
      valid_loss = float(valid_loss) if math.isfinite(valid_loss) else None
    facts: Any = {}
    if self._store:
      try:
        items = frozen.without(items, self._store.arrays())
        facts["frozen"] = self._store.facts()
      except FrozenError as error:
        logging.warning("%s. Step %d holds them, too", error, step)
    facts |= {
      "step": step,
      "arrays": step_reader.arrays(items),
      "data": distributed.merged(data_state),
      "valid_loss": valid_loss,
      "validation_due": validation_due,
    }
    shapes = jax.eval_shape(lambda: items)
    response = step_writer.start(path, items, facts)
    self._pending = self._thread.submit(self._finish, response, path, shapes)
    if jax.default_backend() == "cpu":
      self.wait()
    return True

  def _is_saved(self, path: pathlib.Path) -> bool:
    """Returns whether a step is there; sets aside what else has its name."""
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
      step_writer.seal(path, shapes)
      if path.parent == self._root:
        step_dirs.prune(self._root, int(path.name), self._keep)
        frozen.prune(self._root.parent, self._store)

  def freeze(self, params: Any) -> None:
    """Takes parameters that no later step changes, which saves leave out.

    They are saved now, once, unless the checkpoint that was restored refers to
    a store of the same arrays.

    Args:
      params: nested dict of arrays, a part of the item "params"; {}: none.
    Raises:
      CheckpointError: they cannot be saved, or not be opened again.
    """
    arrays = step_reader.arrays({frozen.ITEM: params})
    self._store = None
    if self._held and self._held.arrays() == arrays:
      self._store = self._held
    elif arrays:
      self._store = self._save_frozen(params, arrays)

  def _save_frozen(self, params: Any, arrays: dict[str, str]) -> frozen.Store:
    workdir, items = self._root.parent, {frozen.ITEM: params}
    number = distributed.of_process_0(frozen.next_number(workdir))
    path = frozen.root(workdir) / str(number)
    if jax.process_index() == 0:
      frozen.prune(workdir, None)  # of a start that was killed
      files.make_folder(path.parent)
    facts = {"step": number, "arrays": arrays, "data": {}}
    response = step_writer.start(path, items, facts)
    shapes = jax.eval_shape(lambda: items)
    self._pending = self._thread.submit(self._finish, response, path, shapes)
    self.wait()
    distributed.of_process_0(number)  # all wait for the seal
    return frozen.Store(path, step_dirs.digest(path / step_dirs.SEAL))

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
        "put it back, in place of what a save may have made there since, and "
        "run the same command again to continue from its newest checkpoint"
      )

  def add_loss(self, step: int, valid_loss: float) -> None:
    """Adds the validation loss that was due when a step was saved."""
    if jax.process_index() == 0:
      loss = float(valid_loss) if math.isfinite(valid_loss) else None
      step_dirs.add_loss(self._root / str(step), loss)

  def restore_latest(
    self, items: dict[str, Any], fresh: str = ""
  ) -> Restored | None:
    """Restores the newest sound checkpoint (the list in the module docstring).

    Args:
      items: pytrees by name of `jax.ShapeDtypeStruct` (or arrays) with the
        dtypes and shardings to restore to, on any mesh.
      fresh: pattern of names of arrays that may be absent there, and are then
        zero, or absent here, and are then left out; "": all must be the same.
    Returns:
      The checkpoint, or None if none was ever committed. Before the first step,
      at step 0, it may lack items: parameters from elsewhere bring no state of
      an optimizer.
    Raises:
      CheckpointError: every checkpoint is damaged, or the frozen parameters
        that the newest refers to.
      TargetError: the newest sound one holds other arrays.
      OSError: it cannot be read, or not be sealed, now; nothing is changed.
    """
    for step in reversed(workdir_lib.saved_steps(self._root)):
      path = self._root / str(step)
      try:
        restored = step_reader.read(path, items, fresh)
        self._held = restored.frozen
        if jax.process_index() == 0 and not step_dirs.is_sealed(path):
          step_dirs.seal(path)
        return restored
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
          f"a checkpoint cannot be written ({first_line(error)}); "
          "earlier ones are whole: run the same command again to continue from "
          "the newest"
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


def _set_aside(path: pathlib.Path, damage: Damaged) -> None:
  aside = step_dirs.set_aside(path)
  logging.warning(
    "checkpoint of step %s is damaged (%s): set aside as %s",
    path.name,
    damage,
    aside.name,
  )


def any_saved(workdir: str | os.PathLike) -> bool:
  """Returns whether a run has saved a checkpoint, even a damaged one."""
  root = pathlib.Path(workdir, workdir_lib.CHECKPOINTS_NAME)
  return bool(workdir_lib.saved_steps(root)) or any(root.glob("corrupt-*"))


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
    CheckpointError: no such step, or it is damaged, or the frozen parameters
      that it refers to.
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
    except (Damaged, OSError, FrozenError) as error:
      if not distributed.of_process_0(path.exists()):
        continue
      if not isinstance(error, Damaged):
        raise
      logging.warning("checkpoint of step %d is damaged (%s)", choice, error)
      damaged.add(choice)


def require_saved(workdir: str | os.PathLike, step: int | str) -> None:
  """Raises CheckpointError unless `restore` would find a step."""
  root = pathlib.Path(workdir).absolute() / workdir_lib.CHECKPOINTS_NAME
  _choose(root, step, set())


def _choose(root: pathlib.Path, step: int | str, damaged: set[int]) -> int:
  """Returns the step that `restore` is asked for, and that is not damaged."""
  saved = workdir_lib.saved_steps(root)
  if not saved:
    raise CheckpointError(f"{root.parent} holds no checkpoint")
  if step == "newest":
    choice = next((x for x in reversed(saved) if x not in damaged), saved[0])
  else:
    choice = step_dirs.best(root) if step == "best" else int(step)
  if choice not in saved:
    raise CheckpointError(
      f"{root.parent} has no checkpoint {step}; saved: "
      f"{', '.join(map(str, saved))}"
    )
  if choice in damaged:
    raise CheckpointError(f"checkpoint {step} of {root.parent} is damaged")
  return choice
