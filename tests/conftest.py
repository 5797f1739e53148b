"""Settings that all tests share."""

import atexit
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile

# The processes of a test run, pytest's workers and the commands that tests
# start, share what they compile. Another folder makes it last.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  folder = tempfile.TemporaryDirectory(prefix="jax_cache_")
  atexit.register(folder.cleanup)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = folder.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax
import pytest

from ultramem_jax import testing

# Tracing makes many objects that live, which Python's collector then looks at
# again and again: a tenth of the time of these tests with its own thresholds.
gc.set_threshold(50_000, 20, 100)

# Compiling dominates these tests: four times faster to compile, unless
# XLA_FLAGS says otherwise. Nor is code cut into parts for several threads, as
# the processes of a run share the cores already. And devices that wait for each
# other do not give up on a loaded machine. The flags added are not in all later
# versions, which refuse an unknown one.
FLAGS = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):
  FLAGS += [
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
  ]
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

# JAX's plugin for GPUs compiles for them without a GPU, or CUDA, too.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

# A missing axis is an error, not a silent broadcast.
jax.config.update("jax_numpy_rank_promotion", "raise")


# Files whose tests take longest. Begun last, one would keep a core waiting.
LONG = {
  *("train_test", "eight_devices_test", "processes_test", "notebook_test"),
  *("faults_test", "wheel_test", "kinds_test"),
}


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(params=["cpu", "accelerator"])
def platform(request, monkeypatch):
  """The forms that ops have for CPUs, and those for all other platforms."""
  if request.param == "accelerator":
    monkeypatch.setattr(
      jax.lax, "platform_dependent", lambda *args, default, **_: default(*args)
    )
  return request.param


@pytest.fixture(scope="session")
def run(tmp_path_factory):
  """Runs a command line: (status, stdout, stderr, seconds).

  It begins with train.py, whose step is not compiled, eval.py or ultramem.
  """
  folder = tmp_path_factory.mktemp("cli")
  driver = subprocess.Popen(
    [sys.executable, "-m", "tests.forked_commands"],
    cwd=testing.ROOT,
    text=True,
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  )

  def run(*command, **environment):
    count = len(list(folder.glob("*.out")))
    case = {
      "command": [str(part) for part in command],
      "environment": environment,
      "stdout": str(folder / f"{count}.out"),
      "stderr": str(folder / f"{count}.err"),
    }
    driver.stdin.write(json.dumps(case) + "\n")
    driver.stdin.flush()
    status, seconds = json.loads(driver.stdout.readline())
    output, errors = (
      pathlib.Path(case[name]).read_text() for name in ("stdout", "stderr")
    )
    return status, output, errors, seconds

  yield run
  driver.stdin.close()
  assert driver.wait(300) == 0
