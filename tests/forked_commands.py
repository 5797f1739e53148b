"""Runs command lines, each in a process that is forked from this one.

This one has imported everything and counted the parameters of a model, so that
each begins at once. It touches no device: a fork of a process with a device
would hang in its first compilation.

Reads a case from each line of the input, in JSON: {"command": [its words],
"environment": {variables by name}, "stdout": file, "stderr": file}; answers
with a line, [exit status, seconds]. The first word is train.py, eval.py or
ultramem. train.py ends where it would compile its step, unless COMPILE is set;
with INTERRUPT, by Ctrl-C.
"""

import importlib
import json
import os
import pkgutil
import signal
import sys
import time
import traceback

import jax
from jax._src import xla_bridge


def warm_up():
  settings = dict(jax.config.values)
  from configs import tiny
  from ultramem_jax import commands
  from ultramem_jax.settings import config
  from ultramem_jax.tools import accounting

  for module in pkgutil.iter_modules(commands.__path__):
    importlib.import_module(f"ultramem_jax.commands.{module.name}")
  accounting.parameters(config.parse(tiny.get_config()).model)
  # Commands change JAX's settings when they run, modules do not.
  assert jax.config.values == settings
  assert not xla_bridge.backends_are_initialized()


def no_step(*arguments):
  if "INTERRUPT" in os.environ:
    # The shell may have turned Ctrl-C off for a background program.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(300)
  raise AssertionError("the training step was to be compiled")


def run(program):
  if program == "ultramem":
    from ultramem_jax import __main__

    __main__.main()
  elif program == "train.py":
    import train
    from ultramem_jax import cli
    from ultramem_jax.tools import training

    if "COMPILE" not in os.environ:
      training.compile_step = no_step
    train.define_flags()
    cli.run(train.main)
  else:
    import eval as evaluation
    from ultramem_jax import cli

    evaluation.define_flags()
    cli.run(evaluation.main)


def run_and_exit(case):
  """Runs a case in this process, a fork."""
  os.dup2(os.open(case["stdout"], os.O_WRONLY | os.O_CREAT), 1)
  os.dup2(os.open(case["stderr"], os.O_WRONLY | os.O_CREAT), 2)
  os.environ.update(case["environment"])
  sys.argv = case["command"]
  status = 0
  try:
    run(sys.argv[0])
  except SystemExit as end:
    status = end.code
  except BaseException:
    traceback.print_exc()
    status = 1
  sys.stdout.flush()
  sys.stderr.flush()
  # At a normal exit Python takes apart all that was imported, for a second.
  os._exit(status)


def main():
  warm_up()
  for line in sys.stdin:
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
      run_and_exit(json.loads(line))
    _, status = os.waitpid(pid, 0)
    answer = os.waitstatus_to_exitcode(status), time.monotonic() - began
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
  main()
