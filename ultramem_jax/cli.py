"""Command lines: the config flag, and user errors told in one line."""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from ultramem_jax.runs import distributed
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config, parse
from ultramem_jax.settings.errors import (
  CheckpointError,
  ConfigError,
  TargetError,
  TrainingError,
)

# What a user can mend: told in one line, with this exit status. An OSError is
# a file that is missing, a directory that is read-only, a disk that is full.
USER_ERRORS = (
  CheckpointError,
  ConfigError,
  OSError,
  TargetError,
  TrainingError,
)
EXIT_STATUS = 2
INTERRUPTED_STATUS = 130  # what a shell reports of a program that Ctrl-C ended


def define_config():
  """Defines --config=FILE and --config.FIELD=VALUE; returns the holder."""
  return config_flags.DEFINE_config_file(
    "config",
    None,
    "File whose get_config() returns the run's settings; "
    "--config.FIELD=VALUE changes one (configs/default.py explains them).",
  )


def define_section(name: str, values: ConfigDict, text: str) -> None:
  """Defines --NAME.FIELD=VALUE for the fields of a section of the config.

  The command line is read here already, so that a field that cannot be ends
  the program here, in one line.
  """
  with _reporting():
    _check_overrides(sys.argv, rf"({name}\.")
    try:
      config_flags.DEFINE_config_dict(name, values, text)
    except AttributeError as error:
      raise ConfigError(_cause(error)) from error


def load(holder) -> Config:
  """The typed Config of the parsed flags.

  Raises:
    ConfigError: no --config given, or a setting that cannot work.
  """
  require(
    holder.value is not None,
    "--config",
    None,
    "must name a file such as configs/tiny.py",
  )
  try:
    return parse(holder.value)
  except OSError as error:  # how the config file failed to load
    raise ConfigError(_cause(error)) from error


def _check_overrides(argv: Sequence[str], prefix: str) -> None:
  """Raises ConfigError if an override in argv can be no field of Config.

  Args:
    argv: a command line.
    prefix: pattern of what stands before a field's name, with the opening
      bracket of the group that is its path in Config.
  """
  for argument in argv[1:]:
    override = re.fullmatch(rf"--?{prefix}[\w.]+)=(.*)", argument, re.DOTALL)
    if override:
      _check_override(*override.groups())


def _check_override(path: str, text: str) -> None:
  """Raises ConfigError if text cannot be the field of Config at path."""
  node: Any = Config
  for depth, name in enumerate(path.split(".")):
    known = (
      {f.name: f.type for f in dataclasses.fields(node)}
      if (dataclasses.is_dataclass(node))
      else {}
    )
    field = ".".join(path.split(".")[: depth + 1])
    require(
      name in known,
      field,
      text,
      f"no such field; known: {', '.join(known) or 'none below it'}",
    )
    node = known[name]
  if node in (int, float):
    try:
      node(text)
    except ValueError:
      require(False, path, text, f"must be of type {node.__name__}")
  if node is bool:
    require(
      text.lower() in ("true", "false", "1", "0"),
      path,
      text,
      "must be true or false",
    )
  require(
    not dataclasses.is_dataclass(node),
    path,
    text,
    "is a section; set one of its fields",
  )


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses argv; a flag that cannot be raises ConfigError."""
  _check_overrides(argv, r"config\.(")
  # --help shows the flags of the main module alone; these are its as well.
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    if module.startswith("ultramem_jax."):
      for flag in defined:
        flags.FLAGS.register_key_flag_for_module(argv[0], flag)
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, OSError) as error:
    raise ConfigError(_cause(error)) from error


def _cause(error: Exception) -> str:
  """A line for a flag that cannot be parsed.

  Of a config file that fails to load: the flag, and the last line of the
  traceback, or the line of a ConfigError alone.
  """
  first, *more = str(error).splitlines()
  if not more:
    return first
  last = more[-1].strip()
  told = re.sub(r"^[\w.]*ConfigError: ", "", last)
  flag = first.partition(": Error whilst")[0]
  # Of a file that is not there, at length.
  flag = re.sub(r"^.*Failed loading config file \w+$", "--config", flag)
  return told if told != last else f"{flag}: {last}"


def run(main: Callable[[], None]) -> None:
  """Runs main() with flags parsed; ends USER_ERRORS and Ctrl-C in one line.

  The exit status is then 2, or 130. Other exceptions keep their traceback. Of
  several processes, the first that fails ends all.
  """

  def checked_main(arguments):
    # JAX would tell which backends it did not find.
    logging.set_verbosity(logging.WARNING)
    if arguments[1:]:
      raise ConfigError(f"unexpected arguments: {' '.join(arguments[1:])}")
    main()

  app.run(_reporting()(checked_main), flags_parser=_reporting()(_parse_flags))


@contextlib.contextmanager
def _reporting():
  """Ends the program, with a line of the cause, at a USER_ERROR or Ctrl-C."""
  with distributed.ending_together():
    try:
      yield
    except USER_ERRORS as error:
      print(f"error: {error}", file=sys.stderr)
      sys.exit(EXIT_STATUS)
    except KeyboardInterrupt:
      print("SIGINT: stopped", file=sys.stderr)
      sys.exit(INTERRUPTED_STATUS)
