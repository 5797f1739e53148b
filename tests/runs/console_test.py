"""Programs whose console is gone, full, closed, or knows few characters."""

import os
import pty
import subprocess
import sys
import time

import pytest

from ultramem_jax import testing

# Shows two thousand lines, more than a pipe holds, and says in a file that it
# has come to its end, and which descriptor that file had.
PROGRAM = """
import sys, time
from ultramem_jax.runs import console
console.complete()
file = open(sys.argv[1], "w")
console.PATIENCE_SECONDS = 0.2
if sys.argv[2] == "outlive":
  console.outlive()
for n in range(2000):
  print("step", n, "naïve " + 40 * "-", file=sys.stderr)
  print("sample", n, "\\N{SNOWMAN}")
  if n == 3:
    console.show_at_once("SIGTERM: naïve")
print(file.fileno(), file=file)
"""


@pytest.fixture
def start(tmp_path):
  """Starts the program; the function that it gives waits for its end."""
  ended = tmp_path / "ended"

  def start(outlive=True, shell="", **streams):
    command = [sys.executable, "-c", PROGRAM, str(ended)]
    command.append("outlive" if outlive else "")
    if shell:
      command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    streams.setdefault("stdout", subprocess.DEVNULL)
    streams.setdefault("stderr", subprocess.DEVNULL)
    process = subprocess.Popen(command, cwd=testing.ROOT, **streams)

    def finish():
      status = process.wait(30)
      return status, int(ended.read_text() or 0)

    return process, finish

  return start


def test_a_program_outlives_the_reader_of_its_pipe(start):
  process, finish = start(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  assert (
    process.stdout.readline() == "step 0 naïve {}\n".format(40 * "-").encode()
  )
  process.stdout.close()
  status, file = finish()
  assert status == 0 and file > 2


def test_a_program_outlives_a_full_disk(start):
  with open("/dev/full", "w") as full:
    _, finish = start(stdout=full, stderr=full)
  assert finish()[0] == 0


def test_a_program_outlives_its_terminal(start):
  leader, follower = pty.openpty()
  _, finish = start(stdout=follower, stderr=follower)
  assert os.read(leader, 4)
  os.close(follower)
  os.close(leader)
  assert finish()[0] == 0


def test_a_program_does_not_wait_for_a_console_that_stands_still(start):
  began = time.monotonic()
  process, finish = start(stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert finish()[0] == 0
  # Nobody reads; what was shown before it stood still is there.
  assert process.stderr.read().startswith(b"step 0 ")
  process.communicate()
  assert time.monotonic() < began + 20


@pytest.mark.parametrize("outlive", [True, False])
def test_no_file_takes_the_place_of_a_closed_stream(start, outlive):
  _, finish = start(outlive, shell=">&- 2>&- <&-")
  status, file = finish()
  assert status == 0 and file > 2


def test_characters_that_a_console_does_not_know_are_escaped(start):
  ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
  process, _ = start(False, stdout=subprocess.PIPE, env=ascii_only)
  output, _ = process.communicate(timeout=30)
  assert output.startswith(b"sample 0 \\u2603\n")
  assert process.returncode == 0


def test_results_that_cannot_be_written_are_an_error(start):
  """Only what merely reports may be dropped."""
  with open("/dev/full", "w") as full:
    _, finish = start(outlive=False, stdout=full)
  assert finish()[0] != 0
