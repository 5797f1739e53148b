"""Processes that time functions when asked, so that they can take turns.

The asking side writes a JSON line [question, name, argument, calls] to a
process and reads back a line: for "seconds" the seconds of each call, after one
that is not counted, since caches and heap are then another process's. A
function is made when it is first asked for, and kept until a line `null` comes.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Run = Callable[[], Any]  # what is timed; it returns when it is done


def serve(
  makers: Mapping[str, Callable[[Any], Run]],
  **questions: Callable[[Run, int], Any],
) -> None:
  """Answers until the input ends.

  Args:
    makers: by name, functions of an argument that return what is timed.
    **questions: others than "seconds": (what is timed, calls) -> what JSON can
      hold.
  """
  # What libraries print must not mix with the answers.
  answers = os.fdopen(os.dup(1), "w")
  os.dup2(2, 1)
  questions["seconds"] = _seconds
  made = {}
  for line in sys.stdin:
    asked = json.loads(line)
    if asked is None:
      made.clear()
      gc.collect()
      continue
    question, name, argument, calls = asked
    key = json.dumps([name, argument])
    if key not in made:
      made[key] = makers[name](argument)
      made[key]()
    print(json.dumps(questions[question](made[key], calls)), file=answers)
    answers.flush()


def _seconds(run: Run, calls: int) -> list[float]:
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
    self._process: subprocess.Popen[str] | None = None

  def ask(self, question: str, name: str, argument: Any, calls: int) -> Any:
    """Returns the answer; raises RuntimeError if the process died."""
    process = self._process = self._process or self._start()
    _write(process, [question, name, argument, calls])
    assert process.stdout  # a pipe
    answer = process.stdout.readline()
    if not answer:
      raise RuntimeError(f"the process of {name} ended: see its output above")
    return json.loads(answer)

  def forget(self) -> None:
    """Frees what the functions hold."""
    if self._process is not None:
      _write(self._process, None)

  def close(self) -> None:
    """Ends the process; the next question starts another."""
    if self._process is not None:
      self._process.communicate()
      self._process = None

  def _start(self) -> subprocess.Popen[str]:
    return subprocess.Popen(
      self._command,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      env=self._environment,
    )


def _write(process: subprocess.Popen[str], message: Any) -> None:
  assert process.stdin  # a pipe
  process.stdin.write(json.dumps(message) + "\n")
  process.stdin.flush()


class Case(NamedTuple):
  """A function of a process.

  worker: the process.
  name: of the function's maker.
  argument: of its maker, which JSON can hold.
  """

  worker: Worker
  name: str
  argument: Any

  def ask(self, question: str, calls: int) -> Any:
    """Returns the process's answer."""
    return self.worker.ask(question, self.name, self.argument, calls)


def take_turns(
  cases: Mapping[str, Case],
  rounds: int,
  turn_seconds: float = 0.1,
  alone: bool = False,
) -> dict[str, list[float]]:
  """Returns the seconds of all calls of each case, the cases taking turns.

  Args:
    cases: by name.
    rounds: turns of each case.
    turn_seconds: how long a turn takes, roughly; it has 2 to 50 calls.
    alone: two cases do not fit in memory: a turn is a process of its own, of
      2 calls.
  """
  calls = dict.fromkeys(cases, 2)
  if not alone:
    for name, case in cases.items():
      (first,) = case.ask("seconds", 1)
      calls[name] = max(2, min(50, round(turn_seconds / first)))
  seconds = {name: [] for name in cases}
  for _ in range(rounds):
    for name, case in cases.items():
      seconds[name] += case.ask("seconds", calls[name])
      if alone:
        case.worker.close()
  return seconds
