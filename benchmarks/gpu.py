"""Everything that wants an accelerator, by one command of under ten minutes.

  python -m benchmarks.gpu [--tiny]

  machine    what it ran on
  layer      the UltraMem layer against the CPU of the same machine, value and
             gradients, in full float32 precision
  lookup     gather-and-pool, and the gradient of its scores, by XLA and by the
             kernel (`ops/lookup_gpu.py`): bytes of rows a second, as a share of
             those of a copy, and how far the two forms are apart
  models     figures 1b and 7 of the paper at the 1.6B sizes, and
  growth     figure 6c (`benchmarks/inference.py`)
  training   tokens a second of the 151M models, dense, MoE and UltraMem

Each part is a process of its own with so many seconds, and what the parts
before it left over: one that fails, hangs or runs out of memory takes no other
with it, and keeps what it has measured. Writes results/gpu.json after every
measurement; plots to results/gpu.png and gpu_lookup.png. Compiled programs are
kept in the directory for temporary files: where compiling took the time, a
second run measures what the first left out. --tiny runs all of it in small, on
any machine.
"""

import contextlib
import functools
import json
import math
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from benchmarks import decoding, inference, report
from ultramem_jax.layers.ultramem import UltraMem
from ultramem_jax.ops import lookup, precision
from ultramem_jax.ops.kernels import pallas
from ultramem_jax.settings.config import MemoryConfig

ROOT = pathlib.Path(__file__).parent.parent
# Of each part; ten minutes, less the start of Python and the plots.
SECONDS = {
  "machine": 30,
  "layer": 40,
  "lookup": 90,
  "models": 190,
  "growth": 75,
  "training": 160,
}
# A part begins nothing new in the last of its seconds: a step of the 1.6B
# models may take that long to compile.
SPARE_SECONDS = 25
# The 1.6B models take more of a GPU than the three quarters that JAX takes.
ENVIRONMENT = {
  "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
  "JAX_COMPILATION_CACHE_DIR": f"{tempfile.gettempdir()}/ultramem_gpu_cache",
}
SIZES = {False: "1b6", True: "tiny"}

TINY = flags.DEFINE_bool("tiny", False, "Small sizes, to try the script out.")
PART = flags.DEFINE_enum("part", None, list(SECONDS), "This one alone.")
LIMIT = flags.DEFINE_float("seconds", None, "That --part may take.")


def check_layer() -> dict[str, float]:
  """Largest difference from the CPU, relative to the largest magnitude.

  Returns:
    "y" and "gradient/NAME"; "same_rows", the share of rows chosen alike: two
    scores that differ by rounding may be ranked the other way.
  """
  config = MemoryConfig(num_keys=64, key_dim=32, value_dim=64, top_m=16)
  layer = UltraMem(config, embed_dim=128)
  x_BTD = jax.random.normal(jax.random.key(0), (4, 32, 128))

  def loss(params, buffers, x_BTD):
    y_BTD, sown = layer.apply(
      {"params": params, "buffers": buffers}, x_BTD, mutable=["intermediates"]
    )
    return jnp.sin(y_BTD).sum(), (y_BTD, sown["intermediates"]["slot_BTAM"][0])

  def run(device, variables, x_BTD):
    inputs = jax.device_put(
      (variables["params"], variables["buffers"], x_BTD), device
    )
    with jax.default_matmul_precision("float32"):
      gradients, (y_BTD, slot_BTAM) = jax.jit(jax.grad(loss, has_aux=True))(
        *inputs
      )
    return jax.device_get((y_BTD, gradients, slot_BTAM))

  cpu = jax.devices("cpu")[0]
  with jax.default_device(cpu):
    variables = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x_BTD))
  y_BTD, gradients, slot_BTAM = run(cpu, variables, x_BTD)
  device_y, device_gradients, device_slot = run(
    jax.devices()[0], variables, x_BTD
  )
  same = np.mean(
    [
      len(np.intersect1d(a, b)) / a.size
      for a, b in zip(
        slot_BTAM.reshape(-1, config.top_m),
        device_slot.reshape(-1, config.top_m),
        strict=True,
      )
    ]
  )

  def difference(a, b):
    return float(abs(a - b).max() / abs(b).max())

  flat = jax.tree_util.tree_leaves_with_path(
    jax.tree.map(difference, device_gradients, gradients)
  )
  return {
    "same_rows": float(same),
    "y": difference(device_y, y_BTD),
    **{f"gradient{jax.tree_util.keystr(p)}": v for p, v in flat},
  }


def measure_lookup(tiny: bool) -> Iterator[dict[str, Any]]:
  """Bytes of rows read a second, by op, dtype, tokens at once and kernel.

  A call reads the rows of so many tokens at once, many times, so that its
  start does not count. "difference": largest, from XLA's form, relative to the
  largest magnitude.
  """
  rows, width, total = (2**12, 64, 512) if tiny else (2**20, 1024, 8192)
  copied = decoding.bandwidth(2**24 if tiny else 2**30)
  table_IW = jax.random.normal(jax.random.key(0), (rows, width))
  for name in ("float32", "bfloat16"):
    stored_IW = precision.encode(table_IW, precision.DTYPES[name])
    for op, tokens in [
      ("pool", 512),
      ("dot", 512),
      ("pool", 8192),
      ("dot", 8192),
      ("pool", 64),
      ("dot", 64),
      ("pool", 1),
    ]:
      if tokens > total:
        continue
      shape = (min(512, total // tokens), 1, tokens, 84)
      index_RBTY, score_RBTYC = (
        jax.random.randint(jax.random.key(1), shape, 0, 4 * rows),
        jax.random.normal(jax.random.key(2), (*shape, 2)),
      )
      calls = {
        kernel: functools.partial(
          _lookup(op, kernel), stored_IW, index_RBTY, score_RBTYC
        )
        for kernel in ("xla", "pallas")
      }
      expected, actual = (call() for call in calls.values())
      difference = abs(actual - expected).max() / abs(expected).max()
      del expected, actual
      read = index_RBTY.size * width * stored_IW.dtype.itemsize
      for kernel, seconds in report.interleaved_seconds(calls, 9).items():
        record = {
          "op": op,
          "dtype": name,
          "tokens": tokens,
          "kernel": kernel,
          "seconds": seconds,
          "share_of_copy": read / seconds / copied,
          "difference": float(difference),
        }
        print(record, flush=True)
        yield record


def _lookup(op: str, kernel: str):
  """(table_IW, index_RBTY, score_RBTYC) -> R results, one after another."""

  def pool(table_IW, index_BTY, score_BTYC):
    kernels = pallas.KERNELS if kernel == "pallas" else ()
    return lookup.pool_rows(table_IW, index_BTY, score_BTYC, 4, kernels)

  def dot(table_IW, index_BTY, score_BTYC):
    pooled_BTEW, gradient = jax.vjp(
      functools.partial(pool, table_IW, index_BTY), score_BTYC
    )
    return gradient(jnp.ones_like(pooled_BTEW))[0]

  function = {"pool": pool, "dot": dot}[op]
  return jax.jit(
    lambda table_IW, *inputs: jax.lax.map(
      lambda x: function(table_IW, *x), inputs
    )
  )


def measure_training(tiny: bool, seconds: float) -> Iterator[dict[str, Any]]:
  """Tokens a second, as train.py reports them once it is under way."""
  batch_size = 4 if tiny else 8  # MoE: 65 GB at 16, as XLA counts
  models = decoding.SIZES["tiny" if tiny else "151m"]
  end = time.monotonic() + seconds
  for model in ("UltraMem", "dense", "MoE"):  # in order of worth
    name = models[model]
    with tempfile.TemporaryDirectory() as workdir:
      process = subprocess.Popen(
        [
          sys.executable,
          "train.py",
          f"--config=configs/{name}.py",
          f"--workdir={workdir}",
          "--config.data.source=stdlib",
          "--config.data.tokenizer=bytes",
          "--config.log_every=2",
          f"--config.batch_size={batch_size}",
        ],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
      )
      try:
        speeds = _speeds(pathlib.Path(workdir, "timing.jsonl"), process, end)
      finally:
        process.kill()  # before it saves a checkpoint
        process.wait()
    record = {
      "model": model,
      "config": name,
      "batch_size": batch_size,
      "tokens_per_second": statistics.median(speeds[1:]),
    }
    print(record, flush=True)
    yield record


def _speeds(path: pathlib.Path, process, end: float, count: int = 6):
  """The first `count` speeds in a run's log, the run still going on."""
  while time.monotonic() < end and process.poll() is None:
    time.sleep(0.2)
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    if len(lines) >= count:
      return [json.loads(line)["tokens_per_second"] for line in lines]
  raise RuntimeError(f"{path} has not come to {count} records")


def setting(tiny: bool, seconds: float) -> inference.Setting:
  if tiny:
    return inference.Setting(
      "tiny",
      "float32",
      0,
      (4, 1),
      2**22,
      sides=(32, 64),
      rounds=3,
      seconds=seconds,
    )
  # Batches in order of worth. 1789 is the published table, of 3.2 million rows
  # in each of six memories.
  return inference.Setting(
    "1b6",
    "bfloat16",
    0,
    (64, 1, 512, 16, 256, 4, 128),
    15 * 2**30,
    sides=(1789, 250, 1000, 500),
    seconds=seconds,
  )


def measure(part: str, tiny: bool, seconds: float):
  """What a part has to say, or an iterator of it."""
  return {
    "machine": lambda: {
      **report.machine(),
      "copy_bytes_per_second": decoding.bandwidth(),
    },
    "layer": check_layer,
    "lookup": lambda: measure_lookup(tiny),
    "models": lambda: inference.compare_models(setting(tiny, seconds)),
    "growth": lambda: inference.compare_growth(setting(tiny, seconds)),
    "training": lambda: measure_training(tiny, seconds),
  }[part]()


def result_path(tiny: bool) -> pathlib.Path:
  return report.RESULTS / ("gpu_tiny.json" if tiny else "gpu.json")


def read(path: pathlib.Path) -> dict[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


def save(path: pathlib.Path, part: str, value) -> None:
  path.write_text(json.dumps({**read(path), part: value}, indent=2) + "\n")


def run_part(part: str, tiny: bool, seconds: float) -> None:
  """Measures in this process, saving after each record."""
  path, found = result_path(tiny), measure(part, tiny, seconds)
  if isinstance(found, dict):
    save(path, part, found)
    return
  records = []
  for record in found:
    records.append(record)
    save(path, part, records)


def run_apart(part: str, tiny: bool, limit: float) -> str | None:
  """Runs a part in a process; says what went wrong."""
  process = subprocess.Popen(
    [
      sys.executable,
      "-m",
      "benchmarks.gpu",
      f"--part={part}",
      f"--tiny={tiny}",
      f"--seconds={max(1.0, limit - SPARE_SECONDS)}",
    ],
    cwd=ROOT,
    start_new_session=True,
    env={**ENVIRONMENT, **os.environ},
  )
  try:
    status = process.wait(limit)
    return f"exit status {status}" if status else None
  except subprocess.TimeoutExpired:
    return f"stopped after {limit:.0f} s"
  finally:
    with contextlib.suppress(ProcessLookupError):  # train.py as well
      os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def plot(result: dict[str, Any], tiny: bool) -> None:
  path = result_path(tiny).with_suffix(".png")
  figures = {x: result[x] for x in ("models", "growth") if result.get(x)}
  if figures:
    inference.plot(
      {
        "size": SIZES[tiny],
        "bandwidth": result.get("machine", {}).get(
          "copy_bytes_per_second", math.nan
        ),
        **figures,
      },
      path,
    )
  if result.get("lookup"):
    _plot_lookup(result["lookup"], path.with_stem(path.stem + "_lookup"))


def _plot_lookup(records, path) -> None:
  figure, axes = plt.subplots(
    1, 2, figsize=(9.4, 4), layout="constrained", sharey=True
  )
  lines = sorted({(r["op"], r["dtype"], r["kernel"]) for r in records})
  for op, dtype, kernel in lines:
    own = sorted(
      (
        r
        for r in records
        if (r["op"], r["dtype"], r["kernel"]) == (op, dtype, kernel)
      ),
      key=lambda r: r["tokens"],
    )
    axes[int(op == "dot")].plot(
      [r["tokens"] for r in own],
      [r["share_of_copy"] for r in own],
      "o-" if kernel == "pallas" else "o:",
      label=f"{dtype}, {kernel}",
      color="C0" if dtype == "float32" else "C1",
    )
  for axis, title in zip(
    axes, ("rows pooled", "gradient of the scores"), strict=True
  ):
    axis.set(
      title=title,
      xlabel="tokens at once",
      xscale="log",
      ylabel="bytes of rows / bytes of a copy",
    )
    axis.legend()
    axis.grid(alpha=0.3)
  figure.savefig(path, dpi=150)
  plt.close(figure)


def main(_) -> None:
  tiny = TINY.value
  if PART.value:
    run_part(PART.value, tiny, LIMIT.value or SECONDS[PART.value])
    return
  report.RESULTS.mkdir(exist_ok=True)
  path = result_path(tiny)
  path.unlink(missing_ok=True)
  failed, left_over = {}, 0.0
  for part, seconds in SECONDS.items():
    began = time.monotonic()
    problem = run_apart(part, tiny, seconds + left_over)
    took = time.monotonic() - began
    left_over += seconds - took
    if problem:
      failed[part] = problem
    print(f"{part}: {took:.0f} s, {problem or 'done'}", flush=True)
  result = read(path)
  ratios = inference.ratios(result.get("models", []))
  for name, by_batch in ratios.items():
    print(name, {b: round(ratio, 2) for b, ratio in by_batch.items()})
  save(path, "ratios", ratios)
  save(path, "failed", failed)
  plot(result, tiny)
  if failed:
    raise SystemExit(f"failed: {failed}")


if __name__ == "__main__":
  app.run(main)
