"""Decoding steps compared: models, growing tables, forms of keys."""

import dataclasses
import functools
import gc
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.harness import timing
from benchmarks.inference import decoding
from ultramem_jax.layers import ultramem
from ultramem_jax.layers.ultramem import UltraMem
from ultramem_jax.model import Transformer
from ultramem_jax.ops import lookup
from ultramem_jax.serve import prepare as prepare_lib
from ultramem_jax.settings.model import ModelConfig

KEYS_BATCHES = (1, 8, 64)
GROWTH = (250, 500, 1000, 2000)  # n, keys of a side; the table has n^2 rows


@dataclasses.dataclass(frozen=True)
class Setting:
  """What is measured, and on what.

  size: of decoding.SIZES.
  dtype: of weights and matmuls.
  vocab_size: of embedding and head; 0 = the config's.
  batches: sequences that decode at once.
  cache: positions that it holds, where they fit.
  cache_bytes: that one model's cache may take.
  sides: n of the tables that grow.
  rounds: timed steps.
  seconds: that a part may take; what does not fit is left out. None: any time.
  """

  size: str
  dtype: str
  vocab_size: int
  batches: tuple[int, ...]
  cache_bytes: int
  cache: int = 2048
  sides: tuple[int, ...] = GROWTH
  rounds: int = 21
  seconds: float | None = None

  def config(self, model: str, **memory: Any) -> ModelConfig:
    """Returns a model's config, with overrides of model.memory."""
    name = decoding.SIZES[self.size][model]
    return decoding.model_config(name, self.dtype, self.vocab_size, **memory)


def default_setting(size: str | None, batches: list[int]) -> Setting:
  """Returns the setting of this machine; None and [] mean its own choice."""
  if jax.default_backend() == "cpu":
    return Setting(
      size or "151m", "float32", 264, tuple(batches or (1, 8, 64)), 2**30
    )
  return Setting(
    size or "1b6",
    "bfloat16",
    0,
    tuple(batches or (1, 4, 16, 64, 128, 256, 512)),
    20 * 2**30,
  )


def _groups(cases: Iterable[Any]) -> list[list[Any]]:
  """Returns what is in memory together: everything on a CPU, else one case."""
  cases = list(cases)
  return [cases] if jax.default_backend() == "cpu" else [[x] for x in cases]


def compare_models(setting: Setting) -> Iterator[dict[str, Any]]:
  """Yields a record for each model and batch; models get the same time."""
  groups = _groups(decoding.SIZES[setting.size])
  began = time.monotonic()
  for done, group in enumerate(groups, 1):
    end = began + (setting.seconds or math.inf) * done / len(groups)
    configs = {model: setting.config(model) for model in group}
    models = {
      model: decoding.prepared_model(config)
      for model, config in configs.items()
    }
    for batch in setting.batches:
      if time.monotonic() > end:
        print(f"{', '.join(group)} batch {batch}: no time left", flush=True)
        continue
      warmup, rounds = 2, max(5, setting.rounds // (1 + batch // 16))
      steps = warmup + rounds
      length = min(
        decoding.cache_length(config, batch, setting.cache, setting.cache_bytes)
        for config in configs.values()
      )
      made = {
        model: decoding.make_step(*models[model], batch, length, steps)
        for model in group
      }
      seconds = timing.interleaved_seconds(
        {model: step.call for model, step in made.items()}, rounds, warmup
      )
      for model, step in made.items():
        record = {
          "model": model,
          "batch": batch,
          "cache": length,
          "seconds": seconds[model],
          "counted_bytes": step.counted_bytes,
          "program_bytes": step.program_bytes,
        }
        print(_line(record), flush=True)
        yield record
      del made, step
    del models
    gc.collect()


def _line(record: dict[str, Any]) -> str:
  achieved = record["counted_bytes"] / record["seconds"]
  return (
    f"{record['model']:<9} batch {record['batch']:>4}  "
    f"cache {record['cache']:>4}  {1e3 * record['seconds']:9.2f} ms  "
    f"{1e-9 * record['counted_bytes']:8.3f} GB counted  "
    f"{1e-9 * achieved:7.1f} GB/s"
  )


def ratios(records: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
  """Returns MoE / UltraMem and UltraMem / dense in time, by common batch."""
  seconds = {(r["model"], r["batch"]): r["seconds"] for r in records}
  batches = sorted({r["batch"] for r in records})
  pairs = {
    "MoE / UltraMem": ("MoE", "UltraMem"),
    "UltraMem / dense": ("UltraMem", "dense"),
  }
  return {
    name: {
      b: seconds[over, b] / seconds[under, b]
      for b in batches
      if (over, b) in seconds and (under, b) in seconds
    }
    for name, (over, under) in pairs.items()
  }


def _in_turn(
  function: Callable[..., Any], *inputs: Sequence[Any]
) -> Callable[[], jax.Array]:
  """Returns a call of a compiled function that takes several inputs in turn."""
  compiled = jax.jit(function).lower(*(x[0] for x in inputs)).compile()
  index = 0

  def call():
    nonlocal index
    index = (index + 1) % len(inputs[0])
    return compiled(*(x[index] for x in inputs))

  return call


def layer_call(
  model: Transformer, variables: Any, batch: int = 1
) -> Callable[[], jax.Array]:
  """Returns a call of a model's first memory layer on one token a row."""
  config = model.config
  layer = UltraMem(
    config.memory,
    config.embed_dim,
    config.num_layers,
    dtype=jnp.dtype(config.dtype),
    prepared_for=model.prepared_for,
  )
  own = {
    name: tree["memory_0"]
    for name, tree in variables.items()
    if "memory_0" in tree
  }
  keys = jax.random.split(jax.random.key(0), decoding.TOKENS)
  x = [
    jax.random.normal(key, (batch, 1, config.embed_dim), config.dtype)
    for key in keys
  ]
  return _in_turn(layer.apply, [own] * len(x), x)


def rows_call(
  config: ModelConfig, table_IW: jax.Array, batch: int = 1
) -> Callable[[], jax.Array]:
  """Returns a call that pools random rows, as many as a layer reads."""
  c = config.memory
  rng = np.random.default_rng(0)
  shape = (batch, 1, c.reads)
  index = [
    jnp.asarray(rng.integers(0, c.expansion * c.num_rows, shape), jnp.int32)
    for _ in range(decoding.TOKENS)
  ]
  score = [jnp.ones((*shape, c.num_cores), jnp.float32)] * len(index)
  return _in_turn(
    functools.partial(lookup.pool_rows, num_pools=c.projections),
    [table_IW] * len(index),
    index,
    score,
  )


def compare_growth(setting: Setting) -> Iterator[dict[str, Any]]:
  """Yields a record of latencies, one token a sequence, for each table."""
  batch = 1 if jax.default_backend() == "cpu" else 512
  end = time.monotonic() + (setting.seconds or math.inf)
  for sides in _groups(setting.sides):
    if time.monotonic() > end:
      print(f"n {sides}: no time left", flush=True)
      continue
    seconds = timing.interleaved_seconds(
      _growth_calls(setting, sides, batch), setting.rounds
    )
    for side in sides:
      record = {
        "side": side,
        "batch": batch,
        **{x: seconds[x, side] for x in ("model", "layer", "rows")},
      }
      print(
        f"n {side:>5}  batch {batch}  "
        + "  ".join(
          f"{x} {1e3 * record[x]:8.3f} ms" for x in ("model", "layer", "rows")
        ),
        flush=True,
      )
      yield record
    gc.collect()


def _growth_calls(
  setting: Setting, sides: Sequence[int], batch: int
) -> dict[tuple[str, int], Callable[[], jax.Array]]:
  """Returns calls of the model, its layer and its row reads, by table."""
  dense, functions = None, {}
  for side in sides:
    config = setting.config("UltraMem", num_keys=side)
    model, variables = decoding.prepared_model(config)
    # The dense part is the same array in all models.
    dense = dense or variables["params"]
    params = {
      name: tree if name.startswith("memory") else dense[name]
      for name, tree in variables["params"].items()
    }
    variables = {**variables, "params": params}
    length = decoding.cache_length(
      config, batch, setting.cache, setting.cache_bytes // len(setting.sides)
    )
    step = decoding.make_step(
      model, variables, batch, length, setting.rounds + 2
    )
    functions |= {
      ("model", side): step.call,
      ("layer", side): layer_call(model, variables, batch),
      ("rows", side): rows_call(config, params["memory_0"]["values"], batch),
    }
  return functions


def compare_keys(setting: Setting) -> Iterator[dict[str, Any]]:
  """Yields latencies of the layer: keys as they are, normalized, merged."""
  for query_per_rank in (True, False):
    yield from _compare_keys(setting, query_per_rank)
    gc.collect()


def _compare_keys(
  setting: Setting, query_per_rank: bool
) -> Iterator[dict[str, Any]]:
  config = setting.config("UltraMem", query_per_rank=query_per_rank)
  plain = decoding.random_model(config)
  prepared = prepare_lib.prepare(*plain)
  # Each form, and up to how many tokens it reads merged keys.
  forms = {"plain": (plain, 0), "normalized": (prepared, 0)}
  if not query_per_rank:
    forms["merged"] = (prepared, max(KEYS_BATCHES))
  for batch in KEYS_BATCHES:
    calls = {}
    for name, ((model, variables), merged_tokens) in forms.items():
      with mock.patch.object(ultramem, "MERGED_TOKENS", merged_tokens):
        calls[name] = layer_call(model, variables, batch)
    seconds = timing.interleaved_seconds(calls, setting.rounds)
    print(
      f"query per rank {query_per_rank!s:<5}  batch {batch:>3}  "
      + "  ".join(f"{k} {1e3 * v:7.3f} ms" for k, v in seconds.items()),
      flush=True,
    )
    yield {"query_per_rank": query_per_rank, "batch": batch, **seconds}
