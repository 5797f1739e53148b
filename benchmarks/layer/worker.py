"""A process that times functions when asked, so that two can alternate.

The asking side writes a JSON line [case, tokens, calls] to the process and
reads back a line: the seconds of each call, after one that is not counted,
since caches and heap are then another process's. A case is made when it is
first asked for, and kept until a line `null` comes.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def serve(cases: Mapping[str, Callable[[int], Callable[[], Any]]]) -> None:
  """Answers until the input ends.

  Args:
    cases: by name, functions of the number of tokens that return what is timed.
  """
  # What libraries print must not mix with the answers.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  made = {}
  for line in sys.stdin:
    asked = json.loads(line)
    if asked is None:
      made.clear()
      gc.collect()
      continue
    name, tokens, calls = asked
    if (name, tokens) not in made:
      made[name, tokens] = cases[name](tokens)
      made[name, tokens]()
    answer = json.dumps(_seconds(made[name, tokens], calls))
    print(answer, file=answers, flush=True)


def _seconds(run: Callable[[], Any], calls: int) -> list[float]:
  run()
  seconds = []
  for _ in range(calls):
    began = time.perf_counter()
    run()
    seconds.append(time.perf_counter() - began)
  return seconds


class Worker:
  """The asking side of a process, which the first question starts."""

  def __init__(self, command: Sequence[str], environment: Mapping[str, str]):
    self._command = command
    self._environment = {**os.environ, **environment}
    self._process = None

  def seconds(self, name: str, tokens: int, calls: int) -> list[float]:
    """Asks for `calls` timed calls; raises RuntimeError if the process died."""
    if self._process is None:
      self._process = subprocess.Popen(
        self._command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=self._environment,
      )
    self._write((name, tokens, calls))
    answer = self._process.stdout.readline()
    if not answer:
      raise RuntimeError(f"the process of {name} ended: see its output above")
    return json.loads(answer)

  def forget(self) -> None:
    """Frees what the cases hold."""
    if self._process is not None:
      self._write(None)

  def _write(self, message: Any) -> None:
    self._process.stdin.write(json.dumps(message) + "\n")
    self._process.stdin.flush()

  def close(self) -> None:
    """Ends the process; the next question starts another."""
    if self._process is not None:
      self._process.communicate()
      self._process = None
