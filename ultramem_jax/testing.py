"""What tests of this project and of models built on it share.

A small model as a Config and as command-line flags, a comparison of arrays,
and commands run in a process of their own.
"""

import os
import pathlib
import subprocess
import sys

import jax
import numpy as np

from configs import tiny
from ultramem_jax.runs import checkpoint
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.train import state as state_lib

ROOT = pathlib.Path(__file__).parents[1]

# Relative to the largest magnitude of the expected array: float32 sums of a
# few hundred terms, taken in another order; one rounding of bfloat16 is 2^-8.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def assert_close(actual, expected, precision="float32", tolerance=None):
  """Compares pytrees of arrays, relative to each expected array's largest."""
  tolerance = TOLERANCE[precision] if tolerance is None else tolerance
  jax.tree.map(
    lambda a, e: _assert_array_close(a, e, tolerance), actual, expected
  )


def _assert_array_close(actual, expected, tolerance):
  actual = np.asarray(actual, np.float64)
  expected = np.asarray(expected, np.float64)
  assert actual.shape == expected.shape
  assert np.isfinite(expected).all()
  scale = max(abs(expected).max(initial=0), 1e-30)
  np.testing.assert_allclose(
    actual / scale, expected / scale, rtol=0, atol=tolerance
  )


# `configs/tiny.py`, shrunk.
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
RUN = {**MODEL, "batch_size": 4, "data.seq_len": 8, "steps": 40}


def small_config(**overrides):
  """The small Config; `model__embed_dim=32` overrides model.embed_dim."""
  c = tiny.get_config()
  c.update_from_flattened_dict(
    {
      **RUN,
      **{name.replace("__", "."): value for name, value in overrides.items()},
    }
  )
  return config_lib.parse(c)


def save_run(workdir, config, corpus="some text"):
  """Makes the workdir of a run whose step 7 has the first parameters."""
  state = jax.jit(lambda: state_lib.init_state(config))()
  workdir_lib.claim(workdir, config, corpus)
  with checkpoint.Checkpointer(workdir, keep=1) as checkpointer:
    checkpointer.save(7, state.to_items(), {}, None)


def flags(overrides):
  """Command-line flags for overrides {"optim.eps": 0.1}."""
  return [f"--config.{name}={value}" for name, value in overrides.items()]


def environment(**variables):
  """Returns the environment of a command that runs on the CPU."""
  return {**os.environ, "JAX_PLATFORMS": "cpu", **variables}


def start(arguments, **variables):
  """Starts Python with arguments in the repository's root."""
  return subprocess.Popen(
    [sys.executable, *map(str, arguments)],
    cwd=ROOT,
    text=True,
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=environment(**variables),
  )


def finish(process):
  """Waits for a started process: (exit status, stdout, stderr)."""
  output, errors = process.communicate(timeout=900)
  return process.returncode, output, errors
