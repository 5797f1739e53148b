"""Command lines: flags of every program, and errors reported in one line."""

import contextlib
import dataclasses
import difflib
import gc
import inspect
import pathlib
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from absl import flags, logging
from ml_collections import ConfigDict, config_flags

from ultramem_jax.runs import (
  compilation_cache,
  console,
  distributed,
  host_memory,
  inputs,
  preemption,
  switches,
)
from ultramem_jax.settings.checks import require
from ultramem_jax.settings.config import Config, parse
from ultramem_jax.settings.errors import ConfigError, UserError

# Reported in one line. An OSError is a file that is missing, a directory that
# is read-only, a disk that is full.
ONE_LINE_ERRORS = (UserError, OSError)
EXIT_STATUS = 2
# The configs of the checkout, or of the installed package.
CONFIGS = pathlib.Path(__file__).parents[1] / "configs"

COMPILATION_CACHE = flags.DEFINE_string(
  "compilation_cache",
  None,
  "Folder where compiled programs are kept for the next start; empty: they are "
  "not kept. Default: that of JAX_COMPILATION_CACHE_DIR, or "
  "~/.cache/ultramem_jax/xla.",
)


def define_config(default: str | None = None) -> None:
  """Defines --config=FILE_OR_NAME and --config.FIELD=VALUE.

  Args:
    default: the name of a config, taken without the flag.
  """
  config_flags.DEFINE_config_file(
    "config",
    default and _config_path(default),
    "File whose get_config() returns the run's settings, or the name of one "
    "in configs/, such as tiny; --config.FIELD=VALUE changes a setting "
    "(configs/default.py explains them).",
  )


def load_config() -> Config:
  """Returns the typed Config of the parsed flags.

  Raises:
    ConfigError: no --config given, or a setting that cannot work.
  """
  values = flags.FLAGS.config
  require(
    values is not None,
    "--config",
    None,
    "must name a file such as configs/tiny.py",
  )
  try:
    config = parse(values)
  except OSError as error:  # how the config file failed to load
    raise ConfigError(_cause(error)) from error
  _require_memory_that_is_set(config)
  return config


def _require_memory_that_is_set(config: Config) -> None:
  """Raises ConfigError if flags set a memory of a model that has none."""
  if config.model.memory.kind != "none":
    return
  given = config_flags.get_override_values(flags.FLAGS["config"])
  for name, value in given.items():
    is_of_memory = name.startswith("model.memory.")
    # What is empty, such as spans="", belongs to a model without memory.
    require(
      not is_of_memory or name == "model.memory.kind" or not value,
      name,
      value,
      "is for a model with a memory: set model.memory.kind, too, which is "
      "'none'",
    )


def config_name() -> str:
  """Returns the name of the config file, such as "tiny"."""
  flag: Any = flags.FLAGS["config"]
  file, _, _ = flag.config_filename.partition(":")  # its argument follows
  return pathlib.Path(file).stem


def define_section(name: str, values: Any, text: str) -> None:
  """Defines --NAME.FIELD=VALUE for each field of a mapping of defaults.

  Checks the command line at once: a field that the section does not have
  ends the program with one line.
  """
  with _reporting():
    _check_overrides(sys.argv, name, f"{name}.")
    try:
      config_flags.DEFINE_config_dict(name, ConfigDict(values), text)
    except AttributeError as error:
      raise ConfigError(_cause(error)) from error


def define_processes() -> None:
  """Defines the flags that `join_processes` reads."""
  flags.DEFINE_string(
    "coordinator",
    None,
    "HOST:PORT of process 0, where several processes share the work, with "
    "--num_processes and --process_id; auto: JAX asks the cluster for all "
    "three, which it does unasked under Slurm, Open MPI up to 4 and GKE.",
  )
  flags.DEFINE_integer(
    "num_processes", None, "Number of processes.", lower_bound=1
  )
  flags.DEFINE_integer(
    "process_id", None, "Number of this process, from 0.", lower_bound=0
  )


def define_accept_changed_data() -> None:
  """Defines --accept_changed_data, which `runs.inputs` asks for."""
  flags.DEFINE_bool(
    inputs.ACCEPT_FLAG,
    False,
    "Go on although the files of data or tokenizer are not those that the run "
    "began with.",
  )


def require_unset(names: Iterable[str], why: str) -> None:
  """Raises ConfigError if the command line has a flag that is not read.

  Args:
    names: of the flags.
    why: what follows the flag and its value.
  """
  for name in names:
    flag = flags.FLAGS[name]
    require(not flag.present, f"--{name}", flag.value, why)


def join_processes(stops_together: bool = False) -> None:
  """Calls `distributed.initialize` with the flags of `define_processes`."""
  values = flags.FLAGS
  distributed.initialize(
    values.coordinator, values.num_processes, values.process_id, stops_together
  )


def run(main: Callable[..., None]) -> None:
  """Parses the command line and calls main with its positional arguments.

  There must be one argument for each parameter of main. --help prints the
  docstring of main's module and the flags. UserError, OSError and Ctrl-C end
  the program with one line and status 2 or 130; other exceptions keep their
  traceback. All end it at once, whatever threads there are, and all of several
  processes. Programs that are compiled are kept for the next start
  (`runs.compilation_cache`), and freed memory for the next step
  (`runs.host_memory`).
  """
  with _reporting():
    console.complete()
    preemption.end_on_interrupt()
    logging.use_absl_handler()
    # JAX would report which backends it did not find.
    logging.set_verbosity(logging.WARNING)
    # Each of Orbax's threads and tasks would show the traceback of what is
    # raised here.
    logging.get_absl_handler().addFilter(
      lambda log: log.name != "asyncio" and "orbax" not in log.pathname
    )
    sys.unraisablehook = _show_unraisable
    if {"--help", "-help", "-h"} & {*sys.argv[1:]}:
      _print_help(main)
      return
    arguments = _parse_flags(sys.argv)
    names = [name.upper() for name in inspect.signature(main).parameters]
    if len(arguments) > len(names):
      extra = " ".join(arguments[len(names) :])
      raise ConfigError(f"unexpected arguments: {extra}")
    if len(arguments) < len(names):
      missing = " ".join(names[len(arguments) :])
      raise ConfigError(f"missing arguments: {missing}")
    switches.require_usable()
    compilation_cache.use(COMPILATION_CACHE.value)
    host_memory.keep_freed()
    # Tracing makes many objects that stay; Python would look at all of them
    # again and again, for a tenth of the time of a start.
    gc.set_threshold(50_000, 20, 100)
    main(*arguments)
    sys.stdout.flush()  # a result that cannot be written is an error


def one_line(text: str) -> str:
  """Returns a text with line ends and terminal controls escaped.

  Errors quote names that are in files, whoever wrote them.
  """
  return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _show_unraisable(error: Any) -> None:
  """Shows errors that no caller sees, except those of TensorStore's threads.

  They report to event loops, which may have ended; whoever waited was told.
  """
  if error.object is not None:
    sys.__unraisablehook__(error)


def fail(message: str, status: int = EXIT_STATUS) -> NoReturn:
  """Ends the program with one line."""
  with contextlib.suppress(OSError):
    print(one_line(message), file=sys.stderr, flush=True)
  sys.exit(status)


def _check_overrides(argv: Sequence[str], flag: str, section: str = "") -> None:
  """Raises ConfigError if argv overrides what cannot be a field of Config.

  Args:
    argv: a command line.
    flag: the fields are those of --FLAG.FIELD=VALUE.
    section: stands before a field in its path in Config.
  """
  for argument in argv[1:]:
    override = re.fullmatch(rf"--?{flag}\.([\w.]+)=(.*)", argument, re.DOTALL)
    if override:
      _check_override(section + override[1], override[2])


def _check_override(path: str, text: str) -> None:
  """Raises ConfigError if text cannot be the field of Config at path."""
  node: Any = Config
  for depth, name in enumerate(path.split(".")):
    known = (
      {f.name: f.type for f in dataclasses.fields(node)}
      if dataclasses.is_dataclass(node)
      else {}
    )
    field = ".".join(path.split(".")[: depth + 1])
    near = difflib.get_close_matches(name, known, 1)
    hint = f"did you mean {near[0]}? " if near else ""
    require(
      name in known,
      field,
      text,
      f"no such field; {hint}known: {', '.join(known) or 'none below it'}",
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
  """Parses argv and returns its positional arguments.

  Raises:
    ConfigError: an unknown flag, or a value that it cannot have.
  """
  _check_overrides(argv, "config")
  fields = [a for a in argv if re.match(r"--?config\.", a)]
  has_default = "config" in flags.FLAGS and flags.FLAGS["config"].default
  is_given = any(re.match(r"--?config(=|$)", a) for a in argv)
  workdir = _value_of("workdir", argv)
  arguments = _find_configs(argv[1:])
  if not (is_given or has_default):
    if "config" in flags.FLAGS and workdir:
      # Before its fields, which are flags only once it is read.
      arguments.insert(0, f"--config={CONFIGS / 'of_workdir.py'}:{workdir}")
    elif fields:
      raise ConfigError(
        f"{fields[0]}: needs --config, the config that it changes, or the "
        "--workdir of a run"
      )
  try:
    return flags.FLAGS([argv[0], *arguments])[1:]
  except (flags.Error, AttributeError, OSError) as error:
    raise ConfigError(_cause(error)) from error


def _value_of(flag: str, argv: Sequence[str]) -> str:
  """Returns the value that argv gives to a flag; "": none."""
  for argument, following in zip(argv, [*argv[1:], ""], strict=True):
    name, equals, value = argument.partition("=")
    if name in (f"--{flag}", f"-{flag}"):
      return value if equals else following
  return ""


def _find_configs(arguments: Sequence[str]) -> list[str]:
  """Returns arguments with the file's path for each --config=NAME."""
  found = list(arguments)
  for index, argument in enumerate(arguments):
    if match := re.fullmatch(r"(--?config=)(.*)", argument, re.DOTALL):
      found[index] = match[1] + _config_path(match[2])
    elif argument in ("--config", "-config") and index + 1 < len(found):
      found[index + 1] = _config_path(found[index + 1])
  return found


def _config_path(name: str) -> str:
  """Returns the path of a config given by path or name, and its :argument."""
  name, colon, argument = name.partition(":")
  path = pathlib.Path(name)
  if not path.suffix and path == pathlib.Path(path.name):
    path = CONFIGS / f"{name}.py"
  require(
    path.is_file(),
    "--config",
    name,
    "no such file; give the path of a config or the name of one in configs/, "
    "such as tiny",
  )
  return f"{path}{colon}{argument}"


def _cause(error: Exception) -> str:
  """Returns one line that says why a flag cannot be parsed.

  If a config file fails to load, the line is that of its ConfigError, or the
  flag and the last line of the traceback.
  """
  text = str(error)
  file = _value_of("config", sys.argv)
  # `ml_collections` lists all fields and their values before its guess.
  if absent := re.search(r'Key "(\w+)" does not exist', text):
    guess = re.search(r'Did you mean \\*"(\w+)', text)
    hint = f"; did you mean {guess[1]}?" if guess else ""
    return f"--config={file}: {absent[1]}: no such field{hint}"
  if "has no attribute 'get_config'" in text:
    return f"--config={file}: has no function get_config"
  unknown = re.match(r"Unknown command line flag '(\w+)'", text)
  fields = {field.name for field in dataclasses.fields(Config)}
  if unknown and unknown[1] in fields and "config" in flags.FLAGS:
    return f"--{unknown[1]}: no such flag; did you mean --config.{unknown[1]}?"
  first, *more = text.splitlines() or [type(error).__name__]
  if not more:
    return first
  last = more[-1].strip()
  told = re.sub(r"^[\w.]*ConfigError: ", "", last)
  flag = first.partition(": Error whilst")[0]
  return told if told != last else f"{flag}: {last}"


def _print_help(main: Callable[..., None]) -> None:
  """Prints the docstring of main's module and this program's flags."""
  print(inspect.getdoc(sys.modules[main.__module__]))
  for module, defined in flags.FLAGS.flags_by_module_dict().items():
    if module == main.__module__ or module.startswith("ultramem_jax."):
      for flag in defined:
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
  print(flags.FLAGS.module_help(sys.argv[0]))


@contextlib.contextmanager
def _reporting() -> Iterator[None]:
  """Ends the program with one line if a user error or Ctrl-C is raised."""
  with distributed.ending_at_once():
    try:
      yield
    except ONE_LINE_ERRORS as error:
      fail(f"error: {error}")
    except KeyboardInterrupt:
      fail("SIGINT: stopped", preemption.INTERRUPTED_STATUS)
