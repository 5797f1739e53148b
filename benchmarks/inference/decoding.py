"""Decoding steps to time: models of the paper with random weights, in memory.

Weights are made in place, leaf by leaf, in the type that they are served in:
nothing is initialized in float32 first, nothing is copied.
"""

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import configs
from ultramem_jax.model import Transformer
from ultramem_jax.serve import generate
from ultramem_jax.serve import prepare as prepare_lib
from ultramem_jax.settings.model import ModelConfig
from ultramem_jax.tools import accounting

# Of three sizes, the configs: MoE and UltraMem at equal parameters and FLOPs,
# and the dense model that both extend.
SIZES = {
  "tiny": {"dense": "tiny_dense", "MoE": "tiny_moe", "UltraMem": "tiny"},
  "151m": {
    "dense": "151m_dense",
    "MoE": "151m_moe_2in32",
    "UltraMem": "151m_x12",
  },
  "1b6": {"dense": "1b6_dense", "MoE": "1b6_moe_2in34", "UltraMem": "1b6_x12"},
}
WEIGHT_STD = 0.02
TOKENS = 64  # different inputs, taken in turn


def model_config(
  name: str, dtype: str, vocab_size: int, **memory: Any
) -> ModelConfig:
  """Returns the ModelConfig of configs/NAME.py, served in dtype.

  Args:
    name: of a config.
    dtype: of weights, tables and matmuls.
    vocab_size: of embedding and head; 0 = the config's.
    **memory: overrides of model.memory.
  """
  overrides = {f"model.memory.{field}": x for field, x in memory.items()}
  if vocab_size:
    overrides["model.vocab_size"] = vocab_size
  return configs.load(name, {**overrides, "model.dtype": dtype}).model


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _filled(shape, dtype, std, seed):
  """Returns hashed counters with mean 0: one pass, no temporaries."""
  x = jax.lax.iota(jnp.uint32, math.prod(shape)) * jnp.uint32(2654435761)
  x = (x ^ (x >> 15) ^ seed) * jnp.uint32(2246822519)
  x = ((x ^ (x >> 13)) >> 8).astype(jnp.float32) * 2**-23 - 1  # in [-1, 1)
  return (math.sqrt(3) * std * x).astype(dtype).reshape(shape)


def _seed(name: str) -> jax.Array:
  return jnp.uint32(zlib.crc32(name.encode()))


def random_model(config: ModelConfig) -> tuple[Transformer, Any]:
  """Returns (model, variables), the variables random; see `prepared_model`.

  On a CPU all memories share one table, and every fourth mixture its experts,
  so that several models fit in memory; none of them stays in a cache from one
  use to the next either way.
  """
  model = Transformer(config)
  shapes = nn.unbox(
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
  )
  made = {}

  def leaf(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith(("scale", "core", "/u", "/t")):
      return jnp.ones(x.shape, x.dtype)
    dtype = x.dtype
    if not name.endswith(("router", "keys")):
      dtype = jnp.dtype(config.dtype)
    if jax.default_backend() == "cpu":
      if name.endswith("values"):
        name = name.split("/")[-1]
      elif "experts_" in name:
        name = re.sub(r"\d+", lambda block: str(int(block[0]) % 4), name)
    if name not in made:
      made[name] = _filled(x.shape, dtype, WEIGHT_STD, _seed(name))
    return made[name]

  return model, jax.tree_util.tree_map_with_path(leaf, shapes)


def prepared_model(config: ModelConfig) -> tuple[Transformer, Any]:
  """Returns (model, variables) of random weights, prepared for serving."""
  return prepare_lib.prepare(*random_model(config))


def cache_length(
  config: ModelConfig, batch: int, longest: int, budget: int
) -> int:
  """Returns the largest power of two whose cache fits in budget bytes.

  Args:
    config: of the model.
    batch: sequences.
    longest: the most positions to return.
    budget: bytes.
  """
  size = jnp.dtype(config.dtype).itemsize
  token = 2 * size * config.num_layers * config.embed_dim * batch
  fits = max(1, budget // token)
  return min(longest, 1 << (fits.bit_length() - 1))


def filled_cache(model: Transformer, batch: int, length: int, used: int) -> Any:
  """Returns a cache of which `used` positions hold random keys and values."""

  def leaf(path, x):
    name = jax.tree_util.keystr(path, simple=True, separator="/")
    if name.endswith("index"):
      return jnp.int32(used)
    if name.endswith("segment"):
      return jnp.ones(x.shape, x.dtype)
    return _filled(x.shape, x.dtype, 1.0, _seed(name))

  return jax.tree_util.tree_map_with_path(
    leaf, generate.abstract_cache(model, batch, length)
  )


@dataclasses.dataclass
class Step:
  """One decoding step of a model at a batch, to be called again and again.

  call: runs a step on other tokens than the one before; returns logits.
  counted_bytes: what `accounting.memory_access` counts.
  program_bytes: what the compiled program says it accesses; loops of unknown
    length count once. None where the backend does not tell.
  """

  call: Callable[[], jax.Array]
  counted_bytes: int
  program_bytes: float | None


def make_step(
  model: Transformer, variables: Any, batch: int, length: int, steps: int
) -> Step:
  """Returns a step over a cache that is full after `steps` of them."""
  config = model.config
  used = max(0, length - steps)
  cache = filled_cache(model, batch, length, used)
  tokens = _tokens(config, batch)
  ones_B1 = jnp.ones((batch, 1), jnp.int32)
  compiled = generate.decode_step.lower(
    model, variables, cache, ones_B1, ones_B1, used * ones_B1
  ).compile()
  costs = compiled.cost_analysis() or {}

  def call():
    nonlocal cache
    cache, logits_BV = compiled(
      variables, cache, next(tokens), ones_B1, used * ones_B1
    )
    return logits_BV

  size = jnp.dtype(config.dtype).itemsize
  return Step(
    call,
    size * accounting.memory_access(config, batch),
    costs.get("bytes accessed"),
  )


def _tokens(config: ModelConfig, batch: int) -> Iterator[jax.Array]:
  """Yields batches of one token a row, different ones in turn."""
  rng = np.random.default_rng(0)
  batches = [
    jnp.asarray(rng.integers(0, config.vocab_size, (batch, 1)), jnp.int32)
    for _ in range(TOKENS)
  ]
  while True:
    yield from batches
