"""The directory of a run, and the configuration that it is bound to.

A workdir holds `config.json`, `checkpoints/`, `metrics.jsonl` and what else the
table in docs/train.md lists.

`claim` binds it to one configuration and one corpus when a run starts there.
Whoever continues the run must give the same; evaluation and generation read
the configuration from the workdir.
"""

import fnmatch
import json
import os
import pathlib
import re
from typing import Any

import jax
from ml_collections import ConfigDict

from ultramem_jax.runs import files
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.checks import INT_END, require, require_text
from ultramem_jax.settings.config import Config
from ultramem_jax.settings.errors import CheckpointError, ConfigError, few

CONFIG_NAME = "config.json"
CHECKPOINTS_NAME = "checkpoints"
INPUTS_NAME = "inputs.json"

# Fields that may change when a run continues, because neither the parameters
# nor metrics.jsonl depend on them. `mesh` is an exception, so that a run can
# move to other devices: sums are then taken in another order, and results agree
# to rounding, not bit for bit. log_every, eval_every and eval_batches are not
# free, because they decide what metrics.jsonl holds.
FREE_FIELDS = (
  "checkpoint",
  "data.prefetch",
  "guard.max_skips",
  "guard.rollbacks",
  "mesh",
  "model.memory.storage.partition",
  "sample",
)

# Fields that --override may change when a run continues: the model and its
# state are the same, and what comes after is another training of them.
OVERRIDABLE_FIELDS = (
  "eval_batches",
  "eval_every",
  "guard",
  "log_every",
  "optim.clip_norm",
  "optim.distillation",
  "optim.final_fraction",
  "optim.init_fraction",
  "optim.learning_rate",
  "optim.rate_multipliers",
  "optim.trainable",
  "optim.value_lr_horizon",
  "optim.value_lr_multiplier",
  "optim.warmup_fraction",
  "optim.weight_decay",
  "optim.z_loss",
  "steps",
)


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
  """Turns {"optim": {"eps": 1}} into {"optim.eps": 1}."""
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = value
  return flat


def _is_free(field: str) -> bool:
  return _is_among(field, FREE_FIELDS)


def _is_among(field: str, sections: tuple[str, ...]) -> bool:
  return any(f"{field}.".startswith(f"{section}.") for section in sections)


def _is_overridable(field: str, config: Config) -> bool:
  # What was rounded when it was frozen cannot be trained from there.
  if field == "optim.trainable" and config.optim.frozen_dtype != "float32":
    return False
  return _is_among(field, OVERRIDABLE_FIELDS)


def _read(workdir: pathlib.Path) -> dict[str, Any]:
  """Returns the content of config.json: {"corpus": str, "config": dict}."""
  path = workdir / CONFIG_NAME
  try:
    held = json.loads(path.read_bytes())
    if isinstance(held["corpus"], str) and isinstance(held["config"], dict):
      return held
    cause = "not a record of corpus and config"
  except (ValueError, KeyError, TypeError, RecursionError) as error:
    cause = f"{type(error).__name__}: {error}"
  raise ConfigError(
    f"{path} is damaged ({cause}): put back a copy or use another --workdir"
  )


def _require_same(
  workdir: pathlib.Path, config: Config, corpus: str, override: bool
) -> None:
  """Raises ConfigError if workdir is bound to another config or corpus.

  With `override`, records the settings that may change, and takes them.
  """
  record = _read(workdir)
  given, held = (
    _flatten(config_lib.to_dict(c)) for c in (config, load_config(workdir))
  )
  changes = {
    field: {"from": held[field], "to": value}
    for field, value in given.items()
    if not _is_free(field) and value != held[field]
  }
  fixed = [x for x in changes if not _is_overridable(x, config)]
  if changes and (fixed or not override):
    named = [
      f"{field} = {changes[field]['to']!r}, held: {changes[field]['from']!r}"
      for field in (fixed if override else changes)
    ]
    wish = (
      f", with init_from = {str(workdir)!r} for its parameters, or the held "
      "value"
      if fixed
      else " or the held value, or --override to go on with the new one"
    )
    if not saved_steps(workdir / CHECKPOINTS_NAME):
      wish += "; it has no checkpoint yet: delete it to begin anew"
    raise ConfigError(
      f"{workdir} holds a run with another config: "
      f"{few(named, '; ')}. Use another --workdir{wish}"
    )
  # What is in the files of the corpus says more than the line about it.
  has_inputs = (workdir / INPUTS_NAME).exists()
  if record["corpus"] != corpus and not has_inputs:
    raise ConfigError(
      f"corpus = {corpus!r}: {workdir} holds a run on {record['corpus']!r}. "
      "Use another --workdir or the held corpus"
    )
  step = max(saved_steps(workdir / CHECKPOINTS_NAME), default=0)
  require(
    config.steps >= step,
    "steps",
    config.steps,
    f"{workdir} holds a run that is at step {step} already",
  )
  if changes and jax.process_index() == 0:
    overrides = [*record.get("overrides", []), {"step": step, **changes}]
    # For other fields the file keeps the values that the run began with.
    bound = ConfigDict(config_lib.to_dict(load_config(workdir)))
    bound.update_from_flattened_dict({k: x["to"] for k, x in changes.items()})
    _write(workdir, record["corpus"], config_lib.parse(bound), overrides)


def saved_steps(folder: pathlib.Path) -> list[int]:
  """Returns the steps of the checkpoints in a folder, ascending."""
  if not folder.is_dir():
    return []
  return sorted(
    int(path.name)
    for path in folder.iterdir()
    # Whoever named a folder "0015" meant something else.
    if path.name.isdecimal() and path.name == str(int(path.name))
    if int(path.name) < INT_END and path.is_dir()
  )


def _write(workdir: pathlib.Path, corpus: str, config: Config, overrides: Any):
  """Writes config.json."""
  record = {"corpus": corpus, "config": config_lib.to_dict(config)}
  if overrides:
    record["overrides"] = overrides
  text = json.dumps(record, indent=2) + "\n"
  files.write_atomically(workdir / CONFIG_NAME, text.encode())


def overridden_at(workdir: str | os.PathLike) -> int:
  """Returns the step from which the present settings hold; 0: the start."""
  overrides = _read(pathlib.Path(workdir)).get("overrides", [])
  return overrides[-1]["step"] if overrides else 0


def is_overridden(workdir: str | os.PathLike, field: str) -> bool:
  """Returns whether a run has gone on with another value of a field."""
  overrides = _read(pathlib.Path(workdir)).get("overrides", [])
  return any(field in changes for changes in overrides)


def held_values(workdir: str | os.PathLike, field: str) -> list[Any]:
  """Returns all values that a field of a run has had, the present one last."""
  record = _read(pathlib.Path(workdir))
  past = [x[field]["from"] for x in record.get("overrides", []) if field in x]
  return [*past, _flatten(config_lib.to_dict(load_config(workdir)))[field]]


def require_name(workdir: str | os.PathLike) -> None:
  """Requires a path below which checkpoints can be saved and read again.

  Raises:
    ConfigError: Orbax writes to another path, or reads from it.
  """
  workdir = os.fspath(workdir)
  require(
    "://" not in workdir,
    "workdir",
    workdir,
    "must be a local or mounted directory, not a URL",
  )
  require_text("workdir", workdir)
  path = os.path.abspath(workdir)
  require(
    "\\" not in path and fnmatch.fnmatchcase(path, path),
    "workdir",
    workdir,
    "must have no backslash and no [...] in its path: no checkpoint could be "
    "read again there",
  )


def split_step(name: str) -> tuple[str, str]:
  """Splits DIR@STEP; without a step, it is the newest checkpoint.

  Args:
    name: of a run's model.
  Returns:
    (workdir, step): the step is newest, best, or a number.
  """
  workdir, _, step = name.rpartition("@")
  if workdir and re.fullmatch("newest|best|[0-9]+", step):
    return workdir, step
  return name, "newest"


def require_unused(flag: str, workdir: str | os.PathLike) -> None:
  """Requires that a new run can have a workdir, which a flag names.

  Raises:
    ConfigError: of `require_name`; or it holds something, or is a mount point.
  """
  require_name(workdir)
  path = pathlib.Path(workdir)
  require(
    not path.exists() or (path.is_dir() and not any(path.iterdir())),
    flag,
    os.fspath(workdir),
    "must be an empty directory, or absent",
  )
  require(
    not path.is_mount(),
    flag,
    os.fspath(workdir),
    "must not be where a file system is mounted, but a folder in it: it is "
    "renamed when all is written",
  )


def require_claimed(workdir: str | os.PathLike) -> None:
  """Requires that a workdir still has its config.json.

  Raises:
    ConfigError: it has none, so that nobody could go on with its run.
  """
  if not pathlib.Path(workdir, CONFIG_NAME).exists():
    raise ConfigError(
      f"{workdir} has lost its {CONFIG_NAME} while the run used it; its "
      "checkpoints are saved: put back a copy"
    )


def claim(
  workdir: str | os.PathLike,
  config: Config,
  corpus: str,
  override: bool = False,
) -> None:
  """Binds a workdir to a configuration, or checks that it already is.

  Args:
    workdir: made if absent; a local or mounted directory.
    config: the run's configuration. `FREE_FIELDS` may differ from the bound
      ones; the file keeps the values that the run began with.
    corpus: one line about what the run depends on besides config, such as the
      Python version whose standard library is read.
    override: binds the workdir to the given values of `OVERRIDABLE_FIELDS`
      from now on; config.json keeps the step and the values before.
  Raises:
    ConfigError: the workdir is bound to another config or corpus (the first
      three fields that differ are named), its config.json is damaged or of
      another version, it holds checkpoints without a config.json, it cannot
      be a directory, or no checkpoint could be read again below its path.
  """
  require_name(workdir)
  workdir = pathlib.Path(workdir)
  try:
    files.make_folder(workdir)
  except OSError as error:
    raise ConfigError(f"workdir = {str(workdir)!r}: {error}") from error
  if (workdir / CONFIG_NAME).exists():
    _require_same(workdir, config, corpus, override)
    return
  checkpoints = workdir / CHECKPOINTS_NAME
  if checkpoints.exists() and any(checkpoints.iterdir()):
    raise ConfigError(
      f"{workdir} holds checkpoints but no {CONFIG_NAME}: put back a copy "
      "or use another --workdir"
    )
  if jax.process_index() == 0:
    _write(workdir, corpus, config, [])


def load_corpus(workdir: str | os.PathLike) -> str:
  """Returns the corpus that a workdir is bound to."""
  return _read(pathlib.Path(workdir))["corpus"]


def load_config(workdir: str | os.PathLike) -> Config:
  """Returns the configuration that a workdir is bound to.

  Raises:
    ConfigError: no such directory, or one that `claim` refuses; no config.json
      in it, a damaged one, or one whose fields this version does not know.
  """
  require_name(workdir)
  workdir = pathlib.Path(workdir)
  require(workdir.is_dir(), "workdir", str(workdir), "no such directory")
  require(
    (workdir / CONFIG_NAME).exists(),
    "workdir",
    str(workdir),
    f"holds no {CONFIG_NAME}, so no run was started there",
  )
  held = _read(workdir)["config"]
  try:
    return config_lib.parse(held)
  except ConfigError as error:
    raise ConfigError(
      f"{workdir / CONFIG_NAME} is not a config of this version ({error}): "
      "use the version that wrote it, or start a new run in another --workdir"
    ) from error


def lock(workdir: str | os.PathLike) -> int:
  """Locks a workdir for training; returns what to close to unlock it.

  Args:
    workdir: with its folder of checkpoints, which is what is locked.
  Raises:
    CheckpointError: another process is training there.
  """
  held = os.open(pathlib.Path(workdir, CHECKPOINTS_NAME), os.O_RDONLY)
  try:
    files.lock(held)
  except BlockingIOError as error:
    os.close(held)
    raise CheckpointError(
      f"another process is training in {pathlib.Path(workdir).absolute()}: "
      "wait for its end or use another --workdir"
    ) from error
  return held


def require_idle(workdir: str | os.PathLike) -> None:
  """Requires that no other process is training in a workdir.

  Raises:
    CheckpointError: one is.
  """
  is_begun = pathlib.Path(workdir, CHECKPOINTS_NAME).is_dir()
  if jax.process_index() == 0 and is_begun:
    os.close(lock(workdir))
