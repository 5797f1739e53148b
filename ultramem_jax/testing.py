"""What tests of this project and of models built on it share.

A small model as a Config and as command-line flags, numbers for the variables
of a model, a comparison of arrays, and commands run in a process of their own.
"""

import os
import pathlib
import subprocess
import sys
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from configs import tiny
from ultramem_jax.runs import checkpoint
from ultramem_jax.runs import workdir as workdir_lib
from ultramem_jax.settings import config as config_lib
from ultramem_jax.settings.config import Config
from ultramem_jax.train import state as state_lib

ROOT = pathlib.Path(__file__).parents[1]

# Relative to the largest magnitude of the expected array: float32 sums of a
# few hundred terms, taken in another order; one rounding of bfloat16 is 2^-8.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def assert_close(
  actual: Any,
  expected: Any,
  precision: str = "float32",
  tolerance: float | None = None,
) -> None:
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


# `configs/tiny.py`, shrunk, with the init that compiles faster.
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
  "model.memory.init": "official",
}
RUN = {**MODEL, "batch_size": 4, "data.seq_len": 8, "steps": 40}


def small_config(**overrides: Any) -> Config:
  """Returns a small Config; `model__embed_dim=32` sets model.embed_dim."""
  c = tiny.get_config()
  c.update_from_flattened_dict(
    {
      **RUN,
      **{name.replace("__", "."): value for name, value in overrides.items()},
    }
  )
  return config_lib.parse(c)


def random_variables(module: nn.Module, *inputs: Any, seed: int = 0) -> Any:
  """Returns variables as `module.init` makes them, of other numbers.

  To compile an initialization takes as long as to compile a model. The scales
  and biases of norms are not all ones and zeros; buffers fit the cores.
  """
  return _draw(jax.eval_shape(module.init, jax.random.key(0), *inputs), seed)


def random_state(config: Config) -> state_lib.TrainState:
  """Returns a state before the first step, with `random_variables`."""
  shapes = jax.eval_shape(lambda: state_lib.init_state(config))
  zeros = jax.device_put(
    jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
  )
  variables = _draw(shapes.variables(), config.seed)
  return state_lib.TrainState.from_items(
    {**zeros.to_items(), **variables}, config.optim.trainable
  )


def _draw(shapes, seed):
  """Returns numbers for the collections of a model."""

  def draw(path, leaf):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    # Its own numbers for every name, whatever else there is.
    random = np.random.default_rng([seed, zlib.crc32(name.encode())])
    *_, last = name.split("/")
    if last == "core":
      numbers = random.uniform(size=leaf.shape)
    elif last == "permutation":
      numbers = random.permutation(leaf.size)
    else:
      # About the std of a matrix that keeps a width of 16.
      numbers = (last == "scale") + random.normal(0, 0.25, leaf.shape)
    if leaf.dtype == jnp.uint16:
      return numbers.astype(jnp.bfloat16).view(np.uint16)
    return numbers.astype(leaf.dtype)

  variables = jax.tree_util.tree_map_with_path(draw, nn.unbox(dict(shapes)))
  if "buffers" in variables:
    _fit_buffers(variables["params"], variables["buffers"])
  return jax.device_put(variables)


def _fit_buffers(params, buffers):
  """Sets the filter vectors of every memory to those of its core."""
  for name, child in buffers.items():
    if isinstance(child, dict):
      _fit_buffers(params[name], child)
  if "u" in buffers:
    u_ARR, _, t_ARR = np.linalg.svd(params["core"].sum(0))
    # Those of positive matrices have one sign.
    buffers.update(u=abs(u_ARR[:, :, 0]), t=abs(t_ARR[:, 0]))


def save_run(
  workdir: str | os.PathLike, config: Config, corpus: str = "some text"
) -> None:
  """Makes the workdir of a run whose step 7 has a `random_state`."""
  state = random_state(config)
  workdir_lib.claim(workdir, config, corpus)
  with checkpoint.Checkpointer(workdir, keep=1) as checkpointer:
    checkpointer.save(7, state.to_items(), {}, None)


def flags(overrides: Mapping[str, Any]) -> list[str]:
  """Returns command-line flags for overrides {"optim.eps": 0.1}."""
  return [f"--config.{name}={value}" for name, value in overrides.items()]


def environment(**variables: str) -> dict[str, str]:
  """Returns the environment of a command that runs on the CPU."""
  return {**os.environ, "JAX_PLATFORMS": "cpu", **variables}


def start(arguments: Iterable[Any], **variables: str) -> subprocess.Popen[str]:
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


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
  """Waits for a started process: (exit status, stdout, stderr)."""
  output, errors = process.communicate(timeout=900)
  return process.returncode, output, errors
