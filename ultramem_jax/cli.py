"""Command lines: the config flag, and user errors told in one line."""

import dataclasses
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from ultramem_jax import distributed
from ultramem_jax.checkpoint import CheckpointError, TargetError
from ultramem_jax.checks import ConfigError, require
from ultramem_jax.config import Config, parse
from ultramem_jax.step import TrainingError

# What a user can mend: told in one line, with this exit status.
USER_ERRORS = (CheckpointError, ConfigError, TargetError, TrainingError)
EXIT_STATUS = 2


def define_config():
  """Defines --config=FILE and --config.FIELD=VALUE; returns the holder."""
  return config_flags.DEFINE_config_file(
      "config", None, "File whose get_config() returns the run's settings."
  )


def load(holder) -> Config:
  """The typed Config of the parsed flags.

  Raises:
    ConfigError: no --config given, or a setting that cannot work.
  """
  require(holder.value is not None, "--config", None,
          "must name a file such as configs/tiny.py")
  try:
    return parse(holder.value)
  except OSError as error:  # how the config file failed to load
    raise ConfigError(_cause(error)) from error


def _check_override(path: str, text: str) -> None:
  """Raises ConfigError if --config.path=text cannot be a field of Config."""
  node: Any = Config
  for depth, name in enumerate(path.split(".")):
    known = {f.name: f.type for f in dataclasses.fields(node)} if (
        dataclasses.is_dataclass(node)) else {}
    field = ".".join(path.split(".")[: depth + 1])
    require(name in known, field, text,
            f"no such field; known: {', '.join(known) or 'none below it'}")
    node = known[name]
  if node in (int, float):
    try:
      node(text)
    except ValueError:
      require(False, path, text, f"must be of type {node.__name__}")
  if node is bool:
    require(text.lower() in ("true", "false", "1", "0"), path, text,
            "must be true or false")
  require(not dataclasses.is_dataclass(node), path, text,
          "is a section; set one of its fields")


def _parse_flags(argv: Sequence[str]) -> list[str]:
  """Parses argv; a flag that cannot be raises ConfigError."""
  for argument in argv[1:]:
    override = re.fullmatch(r"--?config\.([\w.]+)=(.*)", argument, re.DOTALL)
    if override:
      _check_override(*override.groups())
  try:
    return flags.FLAGS(argv)
  except (flags.Error, AttributeError, OSError) as error:
    raise ConfigError(_cause(error)) from error


def _cause(error: Exception) -> str:
  """Of a config file that fails to load: the last line of its traceback."""
  line = str(error).splitlines()[-1].strip()
  return re.sub(r"^[\w.]*ConfigError: ", "", line)


def run(main: Callable[[], None]) -> None:
  """Runs main() with flags parsed; ends USER_ERRORS in one line.

  The exit status is then 2. Other exceptions keep their traceback. Of several
  processes, the first that fails ends all.
  """

  def reported(function, *arguments):
    with distributed.ending_together():
      try:
        return function(*arguments)
      except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(EXIT_STATUS)

  def checked_main(arguments):
    # JAX would tell which backends it did not find.
    logging.set_verbosity(logging.WARNING)
    if arguments[1:]:
      raise ConfigError(f"unexpected arguments: {' '.join(arguments[1:])}")
    main()

  app.run(
      lambda arguments: reported(checked_main, arguments),
      flags_parser=lambda argv: reported(_parse_flags, argv),
  )
