"""Decoding: dense, MoE and UltraMem at equal parameters and FLOPs.

  python -m benchmarks.inference [--size=151m] [--batch=1 --batch=8 ...]

One token a sequence, as in figures 1 and 6 of the paper (arXiv 2411.12364):

  models   latency of a step of the whole models against the batch (1b, 7),
           values read as the paper counts them (1c), and as the compiled
           program counts them
  growth   latency of a step against the size of the table (6c): of the
           UltraMem model, of its memory layer alone and of the row reads
  keys     latency of the layer with keys prepared in each way

Published sizes in bfloat16 on an accelerator; on a CPU the 151M models in
float32, with the vocabulary of bytes: embedding and head are the same in all
models, and no figure counts them. The cache holds 2048 positions, or as many
as fit, which is said. On a CPU the models take turns; on an accelerator, which
cannot hold them all, they come one after another. Writes
results/inference_SIZE.json and .png, after --part with the parts' names; the
machine should do nothing else.
"""

import dataclasses
import functools
import gc
import math
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from benchmarks import decoding, report
from ultramem_jax.layers import ultramem
from ultramem_jax.layers.ultramem import UltraMem
from ultramem_jax.model import Transformer
from ultramem_jax.ops import lookup
from ultramem_jax.serve import prepare as prepare_lib
from ultramem_jax.settings.model import ModelConfig

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

  def config(self, model: str, **memory) -> ModelConfig:
    name = decoding.SIZES[self.size][model]
    return decoding.model_config(name, self.dtype, self.vocab_size, **memory)


def default_setting(size: str | None, batches: list[int]) -> Setting:
  """The setting of this machine; size and batches may be given."""
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


def _groups(cases) -> list[list]:
  """What is in memory together: all of it on a CPU, else each case alone."""
  cases = list(cases)
  return [cases] if jax.default_backend() == "cpu" else [[x] for x in cases]


def compare_models(setting: Setting) -> Iterator[dict[str, Any]]:
  """One record for each model and batch; each model has as much time."""
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
      seconds = report.interleaved_seconds(
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


def _line(record) -> str:
  achieved = record["counted_bytes"] / record["seconds"]
  return (
    f"{record['model']:<9} batch {record['batch']:>4}  "
    f"cache {record['cache']:>4}  {1e3 * record['seconds']:9.2f} ms  "
    f"{1e-9 * record['counted_bytes']:8.3f} GB counted  "
    f"{1e-9 * achieved:7.1f} GB/s"
  )


def ratios(records) -> dict[str, dict[int, float]]:
  """MoE / UltraMem and UltraMem / dense in time, by batch measured of both."""
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


def _varied(function, *inputs):
  """A call of a compiled function on one of several inputs, in turn."""
  compiled = jax.jit(function).lower(*(x[0] for x in inputs)).compile()
  index = 0

  def call():
    nonlocal index
    index = (index + 1) % len(inputs[0])
    return compiled(*(x[index] for x in inputs))

  return call


def layer_call(model: Transformer, variables, batch: int = 1):
  """A call of the first memory layer of a model on one token a row."""
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
  call = _varied(layer.apply, [own] * len(x), x)
  return call


def rows_call(config: ModelConfig, table_IW, batch: int = 1):
  """A call that pools random rows, as many as a layer reads."""
  c = config.memory
  rng = np.random.default_rng(0)
  shape = (batch, 1, c.num_heads * c.top_m)
  index = [
    jnp.asarray(rng.integers(0, c.expansion * c.num_rows, shape), jnp.int32)
    for _ in range(decoding.TOKENS)
  ]
  score = [jnp.ones((*shape, c.num_cores), jnp.float32)] * len(index)
  return _varied(
    functools.partial(lookup.pool_rows, num_pools=c.projections),
    [table_IW] * len(index),
    index,
    score,
  )


def compare_growth(setting: Setting) -> Iterator[dict[str, Any]]:
  """Latencies of one token a sequence as the table grows."""
  batch = 1 if jax.default_backend() == "cpu" else 512
  end = time.monotonic() + (setting.seconds or math.inf)
  for sides in _groups(setting.sides):
    if time.monotonic() > end:
      print(f"n {sides}: no time left", flush=True)
      continue
    seconds = report.interleaved_seconds(
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


def _growth_calls(setting: Setting, sides, batch: int):
  """Calls of the model, of its layer and of its row reads, by table."""
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
  """Latencies of the layer: keys not prepared, normalized, merged as well."""
  for query_per_rank in (True, False):
    yield from _compare_keys(setting, query_per_rank)
    gc.collect()


def _compare_keys(setting, query_per_rank):
  config = setting.config("UltraMem", query_per_rank=query_per_rank)
  plain = decoding.random_model(config)
  prepared = prepare_lib.prepare(*plain)
  # Each form, and up to how many tokens it reads merged keys.
  forms = {"plain": (plain, 0), "normalized": (prepared, 0)}
  if not query_per_rank:
    forms["merged"] = prepared, ultramem.MERGED_TOKENS
  for batch in (1, 8, 64):
    calls = {}
    for name, (model, merged_tokens) in forms.items():
      with mock.patch.object(ultramem, "MERGED_TOKENS", merged_tokens):
        calls[name] = layer_call(*model, batch)
    seconds = report.interleaved_seconds(calls, setting.rounds)
    print(
      f"query per rank {query_per_rank!s:<5}  batch {batch:>3}  "
      + "  ".join(f"{k} {1e3 * v:7.3f} ms" for k, v in seconds.items()),
      flush=True,
    )
    yield {"query_per_rank": query_per_rank, "batch": batch, **seconds}


def plot(result, path) -> None:
  """Latency with its roofline and values read, growth: what was measured."""
  panels = 2 * ("models" in result) + ("growth" in result)
  figure, axes = plt.subplots(
    1, panels, figsize=(4.7 * panels, 4), layout="constrained", squeeze=False
  )
  axes = list(axes[0])
  if "models" in result:
    _plot_models(result, axes.pop(0), axes.pop(0))
  if "growth" in result:
    _plot_growth(result["growth"], axes.pop())
  figure.savefig(path, dpi=150)
  plt.close(figure)


def _plot_models(result, time, access) -> None:
  for color, model in zip(
    ("C7", "C1", "C0"), decoding.SIZES[result["size"]], strict=True
  ):
    own = sorted(
      (r for r in result["models"] if r["model"] == model),
      key=lambda r: r["batch"],
    )
    batches = [r["batch"] for r in own]
    counted = np.array([r["counted_bytes"] for r in own])
    time.plot(
      batches, [1e3 * r["seconds"] for r in own], "o-", color=color, label=model
    )
    time.plot(batches, 1e3 * counted / result["bandwidth"], ":", color=color)
    access.plot(batches, 1e-9 * counted, "o-", color=color, label=model)
  _label(
    time, "batch", "ms a step", "latency; dotted: counted bytes / bandwidth"
  )
  _label(access, "batch", "GB a step", "weights and rows read, as counted")


def _plot_growth(records, axes) -> None:
  for part in ("model", "layer", "rows"):
    axes.plot(
      [r["side"] ** 2 for r in records],
      [1e3 * r[part] for r in records],
      "o-",
      label=part,
    )
  _label(axes, "rows of a table", "ms a step", "growing table")


def _label(axes, xlabel, ylabel, title) -> None:
  axes.set(
    xlabel=xlabel, ylabel=ylabel, title=title, xscale="log", yscale="log"
  )
  axes.legend()
  axes.grid(alpha=0.3)


PARTS = {
  "models": compare_models,
  "growth": compare_growth,
  "keys": compare_keys,
}


def run(setting: Setting, parts=tuple(PARTS)) -> dict[str, Any]:
  """Measures, prints and returns what `main` saves."""
  result = {
    **dataclasses.asdict(setting),
    "bandwidth": decoding.bandwidth(),
    **{part: list(PARTS[part](setting)) for part in parts},
  }
  if "models" in result:
    result["ratios"] = ratios(result["models"])
    for name, by_batch in result["ratios"].items():
      print(name, {b: round(ratio, 2) for b, ratio in by_batch.items()})
  return result


def main(_) -> None:
  setting = default_setting(flags.FLAGS.size, flags.FLAGS.batch)
  setting = dataclasses.replace(setting, cache=flags.FLAGS.cache)
  if flags.FLAGS.n:
    setting = dataclasses.replace(setting, sides=tuple(flags.FLAGS.n))
  parts = flags.FLAGS.part
  result = run(setting, parts)
  chosen = [] if set(parts) == set(PARTS) else parts
  path = report.save("_".join(["inference", setting.size, *chosen]), result)
  if parts != ["keys"]:
    plot(result, path.with_suffix(".png"))


if __name__ == "__main__":
  flags.DEFINE_enum(
    "size",
    None,
    list(decoding.SIZES),
    "Of the models; by default 1b6 on an accelerator, 151m on a CPU.",
  )
  flags.DEFINE_multi_integer(
    "batch", [], "Sequences that decode at once; repeatable.", lower_bound=1
  )
  flags.DEFINE_integer("cache", 2048, "Positions in the cache.", lower_bound=1)
  flags.DEFINE_multi_integer("n", [], "Sides of the growing table; repeatable.")
  flags.DEFINE_multi_enum(
    "part", list(PARTS), list(PARTS), "What to measure; repeatable."
  )
  app.run(main)
