"""Tests of stopping on a signal, with real signals to real processes."""

import os
import pathlib
import signal
import socket
import subprocess
import sys

import jax
import pytest

from ultramem_jax.runs import preemption

LOOP = """
import time
from ultramem_jax.runs import preemption
with preemption.Preemption() as stop:
  print("ready", flush=True)
  step = 0
  while not stop.requested():
    time.sleep(0.01)
    step += 1
  print("saving", flush=True)
  time.sleep({save})
print("done", flush=True)
"""


def start(save):
  return subprocess.Popen(
    [sys.executable, "-c", LOOP.format(save=save)],
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )


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
    assert not stop.requested()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.requested()
    assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
  assert before == (
    signal.getsignal(signal.SIGTERM),
    signal.getsignal(signal.SIGINT),
  )


def test_a_terminal_that_closes_asks_and_never_kills(capfd):
  with preemption.Preemption() as stop:
    for _ in range(3):  # from the kernel, from a shell, from systemd
      os.kill(os.getpid(), signal.SIGHUP)
    assert stop.requested()
    # One SIGTERM may follow, as it does when a machine shuts down.
    os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  assert "SIGHUP: saving and stopping\n" in capfd.readouterr().err


def test_nohup_is_heeded():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with preemption.Preemption() as stop:
      os.kill(os.getpid(), signal.SIGHUP)
      assert not stop.requested()
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_request_ends_what_is_interruptible_and_nothing_else():
  with preemption.Preemption() as stop:
    with stop.interruptible():
      pass
    os.kill(os.getpid(), signal.SIGTERM)  # raises nothing here
    with pytest.raises(preemption.Stopped), stop.interruptible():
      raise AssertionError("the body is not begun")
    with pytest.raises(preemption.Stopped):
      stop.check()


# Computes for a minute without Python, as XLA does when it compiles.
BUSY = """
import hashlib, os, signal, threading
from ultramem_jax.runs import preemption
signal.signal(signal.SIGINT, signal.default_int_handler)
preemption.end_on_interrupt()
if {caught}:
  stop = preemption.Preemption().__enter__()
threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
hashlib.pbkdf2_hmac("sha256", b"", b"", {rounds})
"""


@pytest.mark.parametrize("caught", [False, True])
def test_ctrl_c_ends_what_is_compiled_unless_it_is_caught(caught):
  rounds = 1_000_000 if caught else 10**9  # seconds, or many minutes
  done = subprocess.run(
    [sys.executable, "-c", BUSY.format(caught=caught, rounds=rounds)],
    capture_output=True,
    text=True,
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    timeout=60,
  )
  if caught:
    assert done.returncode == 0
    assert done.stderr == "SIGINT: saving and stopping; once more kills\n"
  else:
    assert (done.returncode, done.stderr) == (130, "SIGINT: stopped\n")


# A process of one, as it joins the others.
ASKED = """
import os, signal, sys
from ultramem_jax.runs import distributed
stops_together, port = map(int, sys.argv[1:])
distributed.initialize(f"localhost:{port}", 1, 0, bool(stops_together))
os.kill(os.getpid(), signal.SIGTERM)
"""


@pytest.mark.parametrize(
  ("stops_together", "status"), [(True, 0), (False, -signal.SIGTERM)]
)
def test_only_a_run_that_stops_together_outlives_sigterm(
  stops_together, status
):
  with socket.socket() as held:
    # Bound, but not listening: the coordinator, which shares ports, can.
    held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    held.bind(("", 0))
    done = subprocess.run(
      [
        sys.executable,
        "-c",
        ASKED,
        str(int(stops_together)),
        str(held.getsockname()[1]),
      ],
      capture_output=True,
      text=True,
      cwd=pathlib.Path(__file__).parents[2],
      env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
  assert done.returncode == status, done.stderr


def test_a_run_that_goes_back_leaves_sigterm_to_jax(monkeypatch):
  """Of several processes, whose service would not be asked again."""
  monkeypatch.setattr(jax, "process_count", lambda: 2)
  service = lambda *_: None
  before = signal.signal(signal.SIGTERM, service)
  try:
    with pytest.raises(ValueError), preemption.Preemption():
      raise ValueError("too many skips")
    assert signal.getsignal(signal.SIGTERM) == service
    with preemption.Preemption():
      pass
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  finally:
    signal.signal(signal.SIGTERM, before)
