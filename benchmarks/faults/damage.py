"""Faults of files: cut off, changed, removed, exchanged."""

import hashlib
import os
import pathlib
import random
import shutil

from benchmarks.faults.digest import Lost
from benchmarks.faults.process import Process
from benchmarks.faults.trial import Trial
from ultramem_jax.runs import step_dirs

NEWEST, OLDER = "8", "4"  # saved in half a run


def truncate(path: pathlib.Path, rng: random.Random) -> None:
  with open(path, "r+b") as f:
    f.truncate(rng.randint(0, max(0, path.stat().st_size - 1)))


def flip(path: pathlib.Path, rng: random.Random) -> None:
  content = bytearray(path.read_bytes() or b"\0")
  for _ in range(rng.choice((1, 1, 20))):
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
  path.write_bytes(content)


def remove(path: pathlib.Path, rng: random.Random) -> None:
  path.unlink()


def fill(path: pathlib.Path, rng: random.Random) -> None:
  """As power cuts leave files: their length, and zeros."""
  path.write_bytes(bytes(path.stat().st_size))


def exchange(path: pathlib.Path, rng: random.Random) -> None:
  """Gives a file the content of another one, and that one its own."""
  others = [p for p in path.parent.rglob("*") if p.is_file() and p != path]
  if others:
    other = rng.choice(sorted(others))
    one, two = path.read_bytes(), other.read_bytes()
    path.write_bytes(two)
    other.write_bytes(one)
  else:
    path.write_bytes(b"")


WAYS = (truncate, flip, remove, fill, exchange)


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(p for p in folder.rglob("*") if p.is_file())


def _digest(folder: pathlib.Path) -> str:
  """Returns a digest of the names and the content of all files."""
  held = hashlib.sha256()
  for path in _files(folder):
    held.update(f"{path.relative_to(folder)} {path.stat().st_size} ".encode())
    held.update(path.read_bytes())
  return held.hexdigest()


def _damage(
  trial: Trial, folder: pathlib.Path, paths: list[pathlib.Path], ways=WAYS
) -> pathlib.Path:
  """Damages one of some files below a folder, and returns which.

  It is a hit if anything changed: an empty file has no bit to flip.
  """
  before, path = _digest(folder), trial.rng.choice(paths)
  trial.rng.choice(ways)(path, trial.rng)
  trial.hit = _digest(folder) != before
  return path


def checkpoint(way):
  """Returns the fault that damages the newest checkpoint in some way."""

  def fault(trial: Trial) -> None:
    folder = trial.workdir / "checkpoints" / NEWEST
    path = _damage(trial, folder, _files(folder), [way])
    trial.moment, trial.damaged = path.name, 1

  return fault


def all_checkpoints(trial: Trial) -> None:
  """Damages every checkpoint: the run must not start over."""
  folder, hits = trial.workdir / "checkpoints", []
  for step in (NEWEST, OLDER):
    # Without its seal a checkpoint is as a kill leaves it, and sound.
    paths = [p for p in _files(folder / step) if p.name != step_dirs.SEAL]
    _damage(trial, folder, paths, (truncate, flip, remove))
    hits.append(trial.hit)
  trial.hit = all(hits)
  process = trial.start().finish()
  if trial.hit:
    _require_refused(process, "every checkpoint")
  trial.mend = lambda: _put_back(trial, "checkpoints")


def frozen(trial: Trial) -> None:
  """Damages the parameters that are not trained: the run must not start over.

  They are beside the checkpoints, which are none the worse.
  """
  folder = trial.workdir / "frozen"
  paths = [path for path in _files(folder) if path.name != step_dirs.LOSS]
  _damage(trial, folder, paths)
  process = trial.start().finish()
  if trial.hit:
    _require_refused(process, "the frozen parameters", "put back a copy")
  if list(trial.workdir.glob("checkpoints/corrupt*")):
    raise Lost("checkpoints that are not damaged were set aside")
  trial.mend = lambda: _put_back(trial, "frozen")


def _put_back(trial: Trial, name: str) -> None:
  """Puts a file or folder of the workdir back as it was after half a run."""
  source, path = trial.scene.half / name, trial.workdir / name
  if source.is_dir():
    shutil.rmtree(path)
    shutil.copytree(source, path)
  else:
    shutil.copy2(source, path)


def step_folders(trial: Trial) -> None:
  """Removes, exchanges or renames the folders of checkpoints."""
  folder = trial.workdir / "checkpoints"
  newest, older = folder / NEWEST, folder / OLDER
  kind = trial.rng.choice(("remove", "exchange", "copy", "strange", "file"))
  trial.moment, trial.damaged = kind, 1
  if kind == "remove":
    shutil.rmtree(newest)
  elif kind == "exchange":
    newest.rename(folder / "x")
    older.rename(newest)
    (folder / "x").rename(older)
    trial.damaged = 2
    trial.start()
    trial.finish()
    trial.mend = lambda: _put_back(trial, "checkpoints")
  elif kind == "copy":
    shutil.copytree(newest, folder / "11")
  elif kind == "strange":
    for name in ("0012", "12.orbax-checkpoint-tmp-1", "corrupt-12", "x y", "٣"):
      shutil.copytree(older, folder / name)
  else:
    (folder / "12").write_text("no folder")
    (folder / "11").mkdir()


def logs(trial: Trial) -> None:
  """Damages logs; they stop no run."""
  names = ("metrics.jsonl", "timing.jsonl", "tensorboard")
  path = trial.workdir / trial.rng.choice(names)
  files = _files(path) if path.is_dir() else [path]
  _damage(trial, trial.workdir, files, (truncate, flip, remove, fill))
  trial.moment = path.name
  trial.loses_logs = path.name == "metrics.jsonl"


def bound(*names: str):
  """Returns the fault that damages what binds a workdir to its run.

  The run goes on as it was, or says what to mend.
  """

  def fault(trial: Trial) -> None:
    path = trial.workdir / trial.rng.choice(names)
    _damage(trial, trial.workdir, [path], (truncate, flip, remove, fill))
    trial.moment = path.name
    trial.start()
    trial.finish()
    trial.mend = lambda: _put_back(trial, path.name)

  return fault


def data(trial: Trial) -> None:
  """Damages the text, with or without a trace in its time."""
  kept = trial.data.with_name("data_kept")
  shutil.copytree(trial.data, kept)
  path = _damage(
    trial, trial.data, _files(trial.data), (truncate, flip, remove, exchange)
  )
  if trial.rng.random() < 0.5:
    for changed in _files(trial.data):
      os.utime(changed, (1e9, 1e9))
  process = trial.start().finish()
  if trial.hit:
    _require_refused(process, path.name)

  def mend():
    shutil.rmtree(trial.data)
    kept.rename(trial.data)

  trial.mend = mend


def cache(trial: Trial) -> None:
  """Damages programs that were compiled: they are compiled anew."""
  trial.cache = trial.workdir.with_name("xla")
  shutil.copytree(trial.scene.cache, trial.cache)
  before = _digest(trial.cache)
  for path in trial.rng.sample(_files(trial.cache), 5):
    trial.rng.choice((truncate, flip, remove, fill))(path, trial.rng)
  trial.hit = _digest(trial.cache) != before
  process = trial.start().finish()
  if process.status != 0:
    raise Lost(f"does not compile anew: {process.errors[-1500:]}")


def _require_refused(process: Process, *parts: str) -> None:
  if process.status != 2:
    raise Lost(f"was not refused ({process.status}): {process.errors[-500:]}")
  line = process.errors.splitlines()[-1]
  for part in parts:
    if part not in line:
      raise Lost(f"its line does not name {part}: {line}")
