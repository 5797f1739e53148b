"""Everything that wants an accelerator, by one command of under ten minutes.

  python -m benchmarks.gpu [--tiny]

  training   tokens a second of the 151M models, dense, MoE and UltraMem
  layer      the UltraMem layer against the CPU of the same machine, value and
             gradients, in full float32 precision
  lookup     gather-and-pool: bytes of rows a second, as a share of those of a
             copy
  inference  figures 1b, 6c and 7 of the paper at the 1.6B sizes
             (`benchmarks/inference.py`)

A part that fails takes no other with it. Writes results/gpu.json and .png.
--tiny runs all of it in small, on any machine.
"""

import functools
import gc
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import traceback

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import decoding, inference, report
from ultramem_jax.layers.ultramem import UltraMem
from ultramem_jax.memory_config import MemoryConfig
from ultramem_jax.ops import lookup

ROOT = pathlib.Path(__file__).parent.parent
TRAINING_SECONDS = 150  # for a model to come under way

TINY = flags.DEFINE_bool("tiny", False, "Small sizes, to try the script out.")


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
        {"params": params, "buffers": buffers}, x_BTD,
        mutable=["intermediates"],
    )
    return jnp.sin(y_BTD).sum(), (y_BTD, sown["intermediates"]["slot_BTAM"][0])

  def run(device, variables, x_BTD):
    inputs = jax.device_put(
        (variables["params"], variables["buffers"], x_BTD), device
    )
    with jax.default_matmul_precision("float32"):
      gradients, (y_BTD, slot_BTAM) = jax.jit(
          jax.grad(loss, has_aux=True)
      )(*inputs)
    return jax.device_get((y_BTD, gradients, slot_BTAM))

  cpu = jax.devices("cpu")[0]
  with jax.default_device(cpu):
    variables = nn.unbox(jax.jit(layer.init)(jax.random.key(1), x_BTD))
  y_BTD, gradients, slot_BTAM = run(cpu, variables, x_BTD)
  device_y, device_gradients, device_slot = run(
      jax.devices()[0], variables, x_BTD
  )
  same = np.mean([
      len(np.intersect1d(a, b)) / a.size
      for a, b in zip(
          slot_BTAM.reshape(-1, config.top_m),
          device_slot.reshape(-1, config.top_m), strict=True,
      )
  ])

  def difference(a, b):
    return float(abs(a - b).max() / abs(b).max())

  flat = jax.tree_util.tree_leaves_with_path(
      jax.tree.map(difference, device_gradients, gradients)
  )
  return {
      "same_rows": float(same), "y": difference(device_y, y_BTD),
      **{f"gradient{jax.tree_util.keystr(p)}": v for p, v in flat},
  }


def measure_lookup(tiny: bool) -> list[dict[str, float]]:
  """Bytes of rows pooled a second, by dtype and tokens."""
  rows, width = (2**12, 64) if tiny else (2**20, 1024)
  batches = (64,) if tiny else (64, 512, 2048, 8192)
  copied = decoding.bandwidth(2**24 if tiny else 2**30)
  records = []
  for dtype in (jnp.float32, jnp.bfloat16):
    table_IW = jnp.full((rows, width), 0.5, dtype)
    if dtype == jnp.bfloat16:  # as tables of bfloat16 are stored
      table_IW = jax.lax.bitcast_convert_type(table_IW, jnp.uint16)
    for batch in batches:
      index_BTK = jax.random.randint(
          jax.random.key(0), (1, batch, 84), 0, 4 * rows
      )
      score_BTKC = jnp.ones((1, batch, 84, 2))
      pool = functools.partial(
          jax.jit(functools.partial(lookup.pool_rows, num_blocks=4)),
          table_IW, index_BTK, score_BTKC,
      )
      seconds = report.interleaved_seconds({"pool": pool}, 21)["pool"]
      read = index_BTK.size * width * table_IW.dtype.itemsize
      records.append({
          "dtype": jnp.dtype(dtype).name, "tokens": batch, "seconds": seconds,
          "share_of_copy": read / seconds / copied,
      })
      print(records[-1], flush=True)
  return records


def measure_training(tiny: bool) -> list[dict[str, float]]:
  """Tokens a second, as train.py reports them once it is under way."""
  records = []
  batch_size = 4 if tiny else 16
  for model, name in decoding.SIZES["tiny" if tiny else "151m"].items():
    with tempfile.TemporaryDirectory() as workdir:
      process = subprocess.Popen(
          [
              sys.executable, "train.py", f"--config=configs/{name}.py",
              f"--workdir={workdir}", "--config.data.source=stdlib",
              "--config.data.tokenizer=bytes", "--config.log_every=2",
              f"--config.batch_size={batch_size}",
          ],
          cwd=ROOT, stdout=subprocess.DEVNULL,
      )
      try:
        speeds = _speeds(pathlib.Path(workdir, "timing.jsonl"), process)
      finally:
        process.kill()  # before it saves a checkpoint
        process.wait()
    records.append({
        "model": model, "config": name, "batch_size": batch_size,
        "tokens_per_second": statistics.median(speeds[1:]),
    })
    print(records[-1], flush=True)
  return records


def _speeds(path: pathlib.Path, process, count: int = 6) -> list[float]:
  """The first `count` speeds in a run's log, the run still going on."""
  deadline = time.monotonic() + TRAINING_SECONDS
  while time.monotonic() < deadline and process.poll() is None:
    time.sleep(0.2)
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    if len(lines) >= count:
      return [json.loads(line)["tokens_per_second"] for line in lines]
  raise RuntimeError(f"{path} has not come to {count} records")


def setting(tiny: bool) -> inference.Setting:
  if tiny:
    return inference.Setting(
        "tiny", "float32", 0, (1, 4), 2**22, sides=(32, 64), rounds=3
    )
  # 1789 is the published table, of 3.2 million rows in each of six memories.
  return inference.Setting(
      "1b6", "bfloat16", 0, (1, 4, 16, 64, 128, 256, 512), 15 * 2**30,
      sides=(250, 500, 1000, 1789),
  )


def main(_) -> None:
  tiny = TINY.value
  # Training first: its processes need the memory that this one will take.
  parts = {
      "training": functools.partial(measure_training, tiny),
      "layer": check_layer,
      "lookup": functools.partial(measure_lookup, tiny),
      "inference": functools.partial(inference.run, setting(tiny)),
  }
  result, failed = {}, []
  name = "gpu_tiny" if tiny else "gpu"
  for part, function in parts.items():
    began = time.monotonic()
    try:
      result[part] = function()
    except Exception:  # what has been measured is kept
      traceback.print_exc()
      failed.append(part)
    gc.collect()
    print(f"{part}: {time.monotonic() - began:.0f} s", flush=True)
    if part != "training":
      path = report.save(name, {**result, "failed": failed})
  if "inference" in result:
    inference.plot(result["inference"], path.with_suffix(".png"))
  if failed:
    raise SystemExit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
  app.run(main)
