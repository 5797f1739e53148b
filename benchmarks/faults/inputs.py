"""What a program reads of strangers: accepted and sensible, or one line.

A property takes a file or values that are almost right: fields are exchanged,
bytes flipped, parts cut off. Whoever reads them may raise a UserError or an
OSError of one line, and nothing else; and writes no file outside its folder.
"""

import os
import pathlib
import random
import sys
import tempfile
import time
import zlib
from typing import Any

import hypothesis
from absl import logging

from benchmarks.faults.properties import (
  LIBRARIES,
  SHARES,
  Property,
  is_there,
  properties,
  with_devices,
)
from benchmarks.faults.readers import Refused
from benchmarks.faults.strange import changes
from ultramem_jax import cli
from ultramem_jax.settings.errors import UserError

# Of a line that a person reads.
LONGEST = 3000
# Characters of an example that is printed.
SHOWN = 1500
_watched: list[str] = []  # the only folder that may be written to, or nothing


def _watch(event: str, arguments: tuple) -> None:
  """Raises if a file is opened for writing outside the watched folder."""
  if event != "open" or not _watched:
    return
  path, _, flags = arguments
  if isinstance(path, str | bytes) and flags & (os.O_WRONLY | os.O_RDWR):
    name = os.path.realpath(os.fsdecode(path))
    # A file without a name is opened by that of its folder.
    without_name = name == tempfile.gettempdir()
    if not without_name and not name.startswith((_watched[0], "/dev/")):
      raise Refused(f"{name} is opened for writing")


def holds(prop: Property, example: Any) -> tuple[str, Any]:
  """Tries a property.

  Returns:
    (line, made): of an error, or ""; and what was made of the example.
  Raises:
    Refused: another error, or a file outside.
  """
  with tempfile.TemporaryDirectory(prefix="faults_input_") as folder:
    path = pathlib.Path(folder).resolve()
    _watched.append(str(path))
    try:
      return "", prop.use(example, path)
    except (UserError, OSError) as error:
      told = cli.one_line(str(error))
      if not told or len(told) > LONGEST:
        raise Refused(f"not a line that can be read: {told!r}") from error
      return told, None
    finally:
      _watched.clear()


def try_all(
  count: int, names: list[str], seed: int, shown: int
) -> dict[str, Any]:
  """Tries properties; returns what came of each.

  Args:
    count: of examples, of all properties together.
    names: of the properties, or none for all.
    seed: of what is random.
    shown: how many accepted examples are printed at the end.
  """
  logging.set_verbosity(logging.ERROR)
  sys.addaudithook(_watch)
  results = {}
  accepted: dict[str, list[tuple[Any, Any]]] = {}
  names = names or list(SHARES)
  for name in [name for name in names if not is_there(name)]:
    print(f"{name:14}left out: it needs {LIBRARIES[name]}")
  every = count / sum(SHARES[name] for name in names if is_there(name))
  for make in (properties, with_devices):
    made = make()
    for name in made:
      if name in names:
        held, of_it = accepted.setdefault(name, []), every * SHARES[name]
        results[name] = _try(name, made[name], round(of_it), seed, held)
  print(f"{sum(result['tried'] for result in results.values())} tried")
  rng = random.Random(seed)
  for name, held in accepted.items():
    # As many of each property.
    some = rng.sample(held, min(-(-shown // len(accepted)), len(held)))
    for example, made in some:
      print(f"\n{name}: {_short(example)}\n  -> {_short(made)}")
  return results


def _short(value: Any) -> str:
  text = value if isinstance(value, str) else repr(value)
  return text if len(text) < SHOWN else f"{text[:SHOWN]}..."


def _try(
  name: str,
  prop: Property,
  count: int,
  seed: int,
  accepted: list[tuple[Any, Any]],
) -> dict[str, Any]:
  """Tries a property; adds what was accepted, with what was made of it."""
  told: list[str] = []
  tried = [0]

  @hypothesis.seed(zlib.crc32(f"{seed}/{name}".encode()))
  @hypothesis.settings(
    max_examples=max(3, count),
    deadline=None,
    database=None,
    suppress_health_check=[
      hypothesis.HealthCheck.too_slow,
      hypothesis.HealthCheck.data_too_large,
      hypothesis.HealthCheck.filter_too_much,
      hypothesis.HealthCheck.large_base_example,
    ],
    phases=[hypothesis.Phase.generate, hypothesis.Phase.shrink],
    report_multiple_bugs=True,
  )
  @hypothesis.given(prop.examples)
  def run(example):
    tried[0] += 1
    line, made = holds(prop, example)
    if line:
      told.append(line)
    else:
      shown = changes(prop.usual, example) if prop.usual else example
      accepted.append((shown, made))

  failure, began = "", time.monotonic()
  try:
    run()
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt):
      raise
    notes = getattr(error, "__notes__", [])
    failure = f"{type(error).__name__}: {error} {' '.join(notes)}"[:3000]
    if isinstance(error, BaseExceptionGroup):
      failure += " | ".join(repr(e)[:500] for e in error.exceptions)
  seconds = time.monotonic() - began
  print(
    f"{name:14}{tried[0]:6} tried in {seconds:.0f} s, {len(told):6} refused in "
    f"one line{'; FAILED: ' + failure if failure else ''}",
    flush=True,
  )
  return {
    "tried": tried[0],
    "refused": len(told),
    "failure": failure,
    "seconds": seconds,
  }
