"""What a program reads of strangers: accepted and sensible, or one line.

A property takes a file or values that are almost right: fields are exchanged,
bytes flipped, parts cut off. Whoever reads them may raise a UserError or an
OSError of one line, and nothing else; and writes no file outside its folder.
"""

import os
import pathlib
import sys
import tempfile
import zlib
from typing import Any

import hypothesis
from absl import logging

from benchmarks.faults.readers import (
  Property,
  Refused,
  properties,
  with_devices,
)
from ultramem_jax import cli
from ultramem_jax.settings.errors import UserError

# Of a line that a person reads.
LONGEST = 3000
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


def holds(prop: Property, example: Any) -> str:
  """Tries a property; returns the line of an error, or "".

  Raises:
    Refused: another error, or a file outside.
  """
  with tempfile.TemporaryDirectory(prefix="faults_input_") as folder:
    path = pathlib.Path(folder).resolve()
    _watched.append(str(path))
    try:
      prop.use(example, path)
    except (UserError, OSError) as error:
      told = cli.one_line(str(error))
      if not told or len(told) > LONGEST:
        raise Refused(f"not a line that can be read: {told!r}") from error
      return told
    finally:
      _watched.clear()
  return ""


def try_all(count: int, names: list[str], seed: int) -> dict[str, Any]:
  """Tries properties; returns what came of each.

  Args:
    count: of examples, of all properties together.
    names: of the properties, or none for all.
    seed: of what is random.
  """
  logging.set_verbosity(logging.ERROR)
  sys.addaudithook(_watch)
  results = {}
  for make in (properties, with_devices):
    made = make()
    for name in made:
      if not names or name in names:
        results[name] = _try(name, made[name], count // 10, seed)
  return results


def _try(name: str, prop: Property, count: int, seed: int) -> dict[str, Any]:
  told: list[str] = []
  tried = [0]

  @hypothesis.seed(zlib.crc32(f"{seed}/{name}".encode()))
  @hypothesis.settings(
    max_examples=max(3, int(count * prop.share)),
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
    if line := holds(prop, example):
      told.append(line)

  failure = ""
  try:
    run()
  except BaseException as error:
    if isinstance(error, KeyboardInterrupt):
      raise
    notes = getattr(error, "__notes__", [])
    failure = f"{type(error).__name__}: {error} {' '.join(notes)}"[:3000]
    if isinstance(error, BaseExceptionGroup):
      failure += " | ".join(repr(e)[:500] for e in error.exceptions)
  print(
    f"{name:14}{tried[0]:6} tried, {len(told):6} refused in one line"
    f"{'; FAILED: ' + failure if failure else ''}",
    flush=True,
  )
  return {"tried": tried[0], "refused": len(told), "failure": failure}
