"""Faults of files: cut off, changed, removed, exchanged."""

import os
import pathlib
import random
import shutil

from benchmarks.faults.digest import Lost
from benchmarks.faults.trial import Trial

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


def checkpoint(way):
  """Returns the fault that damages the newest checkpoint in some way."""

  def fault(trial: Trial) -> None:
    folder = trial.workdir / "checkpoints" / NEWEST
    way(trial.rng.choice(_files(folder)), trial.rng)
    trial.damaged = 1

  return fault


def all_checkpoints(trial: Trial) -> None:
  """Damages every checkpoint: the run must not start over."""
  folder = trial.workdir / "checkpoints"
  for step in (NEWEST, OLDER):
    way = trial.rng.choice((truncate, flip, remove))
    way(trial.rng.choice(_files(folder / step)), trial.rng)
  process = trial.start().finish()
  _require_refused(process, "every checkpoint")

  def mend():
    shutil.rmtree(folder)
    shutil.copytree(trial.scene.half / "checkpoints", folder)

  trial.mend = mend


def step_folders(trial: Trial) -> None:
  """Removes, exchanges or renames the folders of checkpoints."""
  folder = trial.workdir / "checkpoints"
  newest, older = folder / NEWEST, folder / OLDER
  kind = trial.rng.choice(("remove", "exchange", "copy", "strange", "file"))
  trial.damaged = 1
  if kind == "remove":
    shutil.rmtree(newest)
  elif kind == "exchange":
    newest.rename(folder / "x")
    older.rename(newest)
    (folder / "x").rename(older)
    trial.damaged = 2
    trial.start()
    trial.finish()

    def mend():
      shutil.rmtree(folder)
      shutil.copytree(trial.scene.half / "checkpoints", folder)

    trial.mend = mend
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
  if path.is_dir():
    path = trial.rng.choice(_files(path))
  trial.rng.choice((truncate, flip, remove, fill))(path, trial.rng)
  trial.loses_logs = True


def config(trial: Trial) -> None:
  """Damages config.json: the run goes on as it was, or tells what to mend."""
  path = trial.workdir / "config.json"
  trial.rng.choice((truncate, flip, remove, fill))(path, trial.rng)
  trial.start()
  trial.finish()
  trial.mend = lambda: _copy(trial.scene.half / path.name, path)


def inputs(trial: Trial) -> None:
  """Damages what the workdir knows of its data."""
  path = trial.workdir / trial.rng.choice(("inputs.json", "index.npz"))
  trial.rng.choice((truncate, flip, remove, fill))(path, trial.rng)
  trial.start()
  trial.finish()
  trial.mend = lambda: _copy(trial.scene.half / path.name, path)


def data(trial: Trial) -> None:
  """Damages the text, with or without a trace in its time."""
  folder = trial.scene.data
  kept = folder.with_name("data_kept")
  shutil.copytree(folder, kept)
  path = trial.rng.choice(_files(folder))
  trial.rng.choice((truncate, flip, remove, exchange))(path, trial.rng)
  if trial.rng.random() < 0.5:
    for changed in _files(folder):
      os.utime(changed, (1e9, 1e9))

  def mend():
    shutil.rmtree(folder)
    kept.rename(folder)

  trial.mend = mend
  try:
    process = trial.start().finish()
    _require_refused(process, path.name)
  except Lost:
    mend()
    raise


def cache(trial: Trial) -> None:
  """Damages programs that were compiled."""
  folder = trial.scene.cache
  kept = folder.with_name("xla_kept")
  shutil.copytree(folder, kept)
  for path in trial.rng.sample(_files(folder), 5):
    trial.rng.choice((truncate, flip, remove, fill))(path, trial.rng)

  def mend():
    shutil.rmtree(folder)
    kept.rename(folder)

  trial.start().finish()
  trial.mend = mend


def _copy(source: pathlib.Path, path: pathlib.Path) -> None:
  """Puts a file back, unless it did no harm that it was damaged."""
  shutil.copy2(source, path)


def _require_refused(process, *parts: str) -> None:
  if process.status != 2:
    raise Lost(f"was not refused ({process.status}): {process.errors[-500:]}")
  line = process.errors.splitlines()[-1]
  for part in parts:
    if part not in line:
      raise Lost(f"its line does not name {part}: {line}")
