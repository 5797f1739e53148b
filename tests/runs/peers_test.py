"""Processes that watch each other, with real ends of real processes."""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

# A process of three: says that it watches, and then does what it is told.
PROGRAM = """
import os, sys, time
from ultramem_jax.runs import peers
index, port = map(int, sys.argv[1:])
watch = peers.Watch(index, 3)
if index == 0:
  port = watch.listen()
else:
  watch.connect("localhost", port)
print(port, flush=True)
told = sys.stdin.readline()
if told == "fail\\n":
  os._exit(2)
if not told:  # its input is closed
  time.sleep(60)
"""


def start(index, port=0):
  process = subprocess.Popen(
    [sys.executable, "-c", PROGRAM, str(index), str(port)],
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    cwd=pathlib.Path(__file__).parents[2],
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )
  return process, int(process.stdout.readline())


@pytest.fixture
def processes():
  """Three processes; a stranger talks to the first of them, too."""
  first, port = start(0)
  with (
    socket.create_connection(("localhost", port)) as stranger,
    socket.create_connection(("localhost", port)) as silent,
  ):
    stranger.sendall(b"\xff GET / HTTP/1.1\r\n\r\n")
    assert silent.fileno() >= 0
    started = [first, start(1, port)[0], start(2, port)[0]]
    time.sleep(0.2)  # until the first knows the others
    yield started
  for process in started:
    process.kill()
    process.communicate()


@pytest.mark.parametrize("index", [0, 1, 2])
@pytest.mark.parametrize("end", ["kill", "fail"])
def test_all_end_when_one_is_gone_and_name_it(processes, index, end):
  gone = processes.pop(index)
  if end == "kill":
    gone.send_signal(signal.SIGKILL)
  else:
    gone.communicate("fail\n")
  gone.wait()
  for process in processes:
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert re.fullmatch(
      rf"error: process {index} of 3 is gone, so process \d ends; .*\n", errors
    )


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_one_that_ends_well_leaves_the_others(processes, order):
  for index in order:
    _, errors = processes[index].communicate("end\n", timeout=20)
    assert (processes[index].returncode, errors) == (0, "")
    time.sleep(0.1)
    left = [processes[i] for i in order if processes[i].returncode is None]
    assert all(process.poll() is None for process in left)


def test_who_cannot_connect_goes_without(tmp_path):
  with socket.create_server(("localhost", 0)) as server:
    port = server.getsockname()[1]
  process, _ = start(1, port)  # nobody listens there any more
  _, errors = process.communicate("end\n", timeout=20)
  assert (process.returncode, errors) == (0, "")
