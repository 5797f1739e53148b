"""The small model that the tests of step, sampler and runs share.

It is `configs/tiny.py`, shrunk; as a Config, and as command-line flags.
"""

import os
import pathlib
import re
import subprocess
import sys

from configs import tiny
from ultramem_jax.settings import config as config_lib
from ultramem_jax.tools import compile as compile_lib
from ultramem_jax.train import compiler_options, program, sharding

ROOT = pathlib.Path(__file__).parents[1]

MODEL = {
  "model.embed_dim": 16,
  "model.num_layers": 2,
  "model.num_heads": 2,
  "model.mlp_dim": 32,
  "model.memory.spans": "1:2",
  "model.memory.num_keys": 8,
  "model.memory.key_dim": 4,
  "model.memory.value_dim": 8,
  "model.memory.top_m": 3,
}


def config(**overrides):
  """The small Config; `model__embed_dim=32` overrides model.embed_dim."""
  c = tiny.get_config()
  c.update_from_flattened_dict(
    {
      **MODEL,
      "batch_size": 4,
      "data.seq_len": 8,
      "steps": 40,
      **{name.replace("__", "."): value for name, value in overrides.items()},
    }
  )
  return config_lib.parse(c)


def span_overlap(devices) -> list[str]:
  """What runs beside collectives in the example of docs/compile.md.

  It is a memory that is read in block 0 and added after block 2.
  """
  c = tiny.get_config()
  c.update_from_flattened_dict(
    {
      "model.num_layers": 3,
      "model.memory.spans": "1:3",
      "model.embed_dim": 512,
      "model.mlp_dim": 2048,
      "model.memory.value_dim": 512,
      "model.memory.partition": "columns",
      "mesh.fsdp": len(devices),
    }
  )
  config = config_lib.parse(c)
  mesh = sharding.make_mesh(config, devices)
  layout = sharding.make_layout(config, mesh)
  lowered = program.lower_train_step(
    config, *program.abstract_inputs(config, layout), layout
  )["train"]
  compiled = lowered.compile(compiler_options.for_device(devices[0]))
  return compile_lib.report(compiled, mesh)["overlap"]


def assert_lookup_overlaps(lines: list[str]) -> None:
  """Its all-to-alls run beside dense layers of the span, back and forth."""
  form = r"all-to-all of memory_0/memory_0{} beside .*block_[12]/\w+{}.*"
  for direction in ("", " backward"):
    assert any(
      re.fullmatch(form.format(direction, direction), line) for line in lines
    ), lines


def flags(overrides):
  """Command-line flags for overrides {"optim.eps": 0.1}."""
  return [f"--config.{name}={value}" for name, value in overrides.items()]


def environment(cache, **variables):
  """Environment of a command: CPU, with a compilation cache to share."""
  return {
    **os.environ,
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(cache),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    **variables,
  }


def start(arguments, cache, **variables):
  """Starts Python with arguments in the repository's root."""
  return subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    cwd=ROOT,
    text=True,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=environment(cache, **variables),
  )


def finish(process):
  """Waits for a started process: (exit status, stdout, stderr)."""
  output, errors = process.communicate(timeout=900)
  return process.returncode, output, errors
