"""Tests of stopping on a signal, with real signals to real processes."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from ultramem_jax import preemption

LOOP = """
import time
from ultramem_jax import preemption
with preemption.Preemption() as stop:
  print("ready", flush=True)
  step = 0
  while not stop.requested(step):
    time.sleep(0.01)
    step += 1
  print("saving", flush=True)
  time.sleep({save})
print("done", flush=True)
"""


def start(save):
  return subprocess.Popen(
      [sys.executable, "-c", LOOP.format(save=save)], text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      cwd=pathlib.Path(__file__).parents[1],
      env={**os.environ, "JAX_PLATFORMS": "cpu"})


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_stops_and_second_kills(number):
  gentle, forced = start(save=0), start(save=60)
  for process in (gentle, forced):
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    assert process.stdout.readline() == "saving\n"
  assert rest(gentle) == ("done\n", 0)
  errors = gentle.stderr.read()
  assert f"{number.name}: saving and stopping; once more kills" in errors
  forced.send_signal(number)
  assert rest(forced) == ("", -number)


def rest(process):
  """What a process still prints, and its exit status.

  By the stream that `readline` reads, which may hold later lines already;
  `communicate` would not see those.
  """
  return process.stdout.read(), process.wait()


def test_handlers_are_put_back():
  before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
  with preemption.Preemption() as stop:
    assert not stop.requested(0)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested(1)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  assert before == (
      signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
