"""What a run reads: `inputs.json`, and a copy of its tokenizer.

`bind` records the size and a digest of every file of data and of the tokenizer
when a run begins. Whoever goes on, or evaluates on the run's own text, must
find the same. The tokenizer is copied, as a model is worthless without it.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Collection, Iterator, Mapping

import jax

from ultramem_jax.runs.files import write_atomically
from ultramem_jax.runs.workdir import INPUTS_NAME
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import ConfigError, few

INDEX_NAME = "index.npz"
TOKENIZER_NAME = "tokenizer"

ACCEPT_FLAG = "accept_changed_data"

# {setting: {name of a file: its size and digest}}
Inputs = Mapping[str, Mapping[str, str]]


def bind(
  workdir: str | os.PathLike,
  inputs: Inputs,
  tokenizer_files: Mapping[str, str],
  accept_changed: bool,
) -> str:
  """Records what a run reads, or checks that it still reads the same.

  Args:
    workdir: `workdir.claim` has bound it.
    inputs: all files that the run reads.
    tokenizer_files: those to copy: {name of the copy: path}.
    accept_changed: takes what is read now for what the run reads.
  Returns:
    A line about what was accepted, or "".
  Raises:
    ConfigError: the run read something else so far, or inputs.json is damaged.
  """
  workdir = pathlib.Path(workdir)
  changes = require_same(workdir, inputs, accept_changed)
  is_new = not (workdir / INPUTS_NAME).exists()
  if jax.process_index() == 0 and (is_new or changes):
    held = _read(workdir / INPUTS_NAME) or {}
    if tokenizer_files:
      _copy_tokenizer(
        workdir / TOKENIZER_NAME,
        tokenizer_files,
        held.get("data.tokenizer", {}).keys(),
      )
    text = json.dumps(inputs, indent=1) + "\n"
    write_atomically(workdir / INPUTS_NAME, text.encode())
  return changes


def _copy_tokenizer(
  folder: pathlib.Path, files: Mapping[str, str], held: Collection[str]
) -> None:
  """Makes a folder hold copies of files, and none that it held before.

  What else a user has put there is left alone.
  """
  folder.mkdir(exist_ok=True)
  for name, path in files.items():
    copy = folder / name
    if not (copy.exists() and copy.samefile(path)):
      write_atomically(copy, pathlib.Path(path).read_bytes())
  for name in set(held) - files.keys():
    (folder / name).unlink(missing_ok=True)


def require_same(
  workdir: str | os.PathLike, inputs: Inputs, accept_changed: bool
) -> str:
  """Checks that inputs are those that a run has read so far.

  Args:
    workdir: the run's; without an inputs.json nothing is compared.
    inputs: the files of some settings, or of all.
    accept_changed: returns what would be raised.
  Returns:
    What has changed, in a line; "" if nothing has.
  Raises:
    ConfigError: something has changed, or inputs.json is damaged.
  """
  held = _read(pathlib.Path(workdir) / INPUTS_NAME)
  changes = list(_changes(held, inputs)) if held is not None else []
  if not changes:
    return ""
  line = f"the data of this run have changed: {few(changes, '; ')}"
  if accept_changed:
    return line
  raise ConfigError(
    f"{workdir}: {line}. Put back what it began with, use another --workdir, "
    f"or continue anyway with --{ACCEPT_FLAG}"
  )


def _changes(held: Inputs, given: Inputs) -> Iterator[str]:
  """Yields which files of the given settings differ, and how."""
  for field, files in given.items():
    before = held.get(field, {})
    for name in sorted(before.keys() | files.keys()):
      if name not in files:
        yield f"{field}: {name} is gone"
      elif name not in before:
        yield f"{field}: {name} is new"
      elif before[name] != files[name]:
        yield f"{field}: {name} has changed"


def _read(path: pathlib.Path) -> Inputs | None:
  """Returns what `bind` recorded; None if it did not."""
  if not path.exists():
    return None
  try:
    held = json.loads(path.read_bytes())
    if all(isinstance(files, dict) for files in held.values()):
      return held
    cause = "not a record of files"
  except (ValueError, AttributeError, RecursionError) as error:
    cause = f"{type(error).__name__}: {error}"
  raise ConfigError(
    f"{path} is damaged ({cause}): put back a copy, or delete it to take the "
    "data that are there for those of the run"
  )


def digest(inputs: Inputs) -> str:
  """Returns a short digest, the same for the same inputs."""
  text = json.dumps(inputs, sort_keys=True)
  return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def own_tokenizer(config: Config, workdir: str | os.PathLike) -> Config:
  """Returns a run's config with the tokenizer that its workdir holds."""
  folder = pathlib.Path(workdir) / TOKENIZER_NAME
  if config.data.tokenizer == "bytes" or not folder.is_dir():
    return config
  data = dataclasses.replace(config.data, tokenizer=str(folder))
  return dataclasses.replace(config, data=data)


def copy(workdir: str | os.PathLike, output: str | os.PathLike) -> None:
  """Copies what a run reads to the workdir of another, on process 0."""
  if jax.process_index() > 0:
    return
  source, target = pathlib.Path(workdir), pathlib.Path(output)
  if (source / TOKENIZER_NAME).is_dir():
    shutil.copytree(
      source / TOKENIZER_NAME, target / TOKENIZER_NAME, dirs_exist_ok=True
    )
  if (source / INPUTS_NAME).exists():
    content = (source / INPUTS_NAME).read_bytes()
    write_atomically(target / INPUTS_NAME, content)
