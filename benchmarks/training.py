"""Training: models at equal FLOPs, and the update of a table as it grows.

  python -m benchmarks.training [--full]

Models: tokens per second, bytes held by a device and model FLOPs utilisation
(three times the forward's, over what a large float32 matmul reaches here) of
the 151M dense, MoE, product-key and UltraMem models; shrunk unless --full,
which wants an accelerator. Update: 512 tokens of the x12 layer's shape, tables
of 62,500 to 1,210,000 rows (7.4 GB), float32 and bfloat16. All in turn, about
4 minutes on two cores. Writes results/training.json and results/training.png.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from benchmarks import report
from ultramem_jax import accounting, program, step
from ultramem_jax import config as config_lib
from ultramem_jax.ops import precision, row_order, row_update

FULL = flags.DEFINE_bool("full", False, "The published sizes.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds.", lower_bound=1)

MODELS = {
    "dense": "151m_dense", "MoE": "151m_moe_2in32", "PKM": "151m_pkm_x10",
    "UltraMem": "151m_x12",
}
SHRUNK = {
    "model.embed_dim": 256, "model.num_layers": 6, "model.num_heads": 4,
    "model.dtype": "float32", "model.remat": "none", "model.dropout_rate": 0.0,
    "model.vocab_size": 264, "data.seq_len": 128, "batch_size": 4,
}
SHRUNK_PARTS = {
    "dense": {"model.mlp_dim": 1024},
    "MoE": {"model.moe.expert_dim": 512},
    "PKM": {
        "model.mlp_dim": 1024, "model.memory.spans": "3:3",
        "model.memory.num_keys": 200, "model.memory.key_dim": 64,
        "model.memory.value_dim": 256, "model.memory.top_m": 16,
    },
    "UltraMem": {
        "model.mlp_dim": 1024, "model.memory.spans": "2:3/4:5",
        "model.memory.num_keys": 200, "model.memory.key_dim": 64,
        "model.memory.value_dim": 128, "model.memory.top_m": 16,
    },
}
SIDES = (250, 500, 1100)  # n, of tables of n^2 rows
TOKENS, READS, BLOCKS, CORES, WIDTH = 512, 84, 4, 2, 512


def model_config(label: str) -> config_lib.Config:
  c = importlib.import_module(f"configs.{MODELS[label]}").get_config()
  c.batch_size = 8
  if not FULL.value:
    c.update_from_flattened_dict({**SHRUNK, **SHRUNK_PARTS[label]})
  return config_lib.parse(c)


def trainer(config: config_lib.Config):
  """(a function that runs one step, bytes that the device holds)."""
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
      (
          jax.eval_shape(functools.partial(step.init_state, config)),
          step.abstract_batch(config),
      ),
  )
  train_step = program.TrainProgram(config, *abstract)
  state = jax.jit(functools.partial(step.init_state, config))()
  rng = np.random.default_rng(0)
  shape = (config.batch_size, config.data.seq_len)
  tokens_BT = jnp.asarray(rng.integers(0, 256, shape), jnp.int32)
  batch = {
      "tokens": tokens_BT, "targets": tokens_BT,
      "weights": jnp.ones(shape), "segments": jnp.ones(shape, jnp.int32),
      "positions": jnp.zeros(shape, jnp.int32) + jnp.arange(shape[1]),
  }

  def run():
    nonlocal state
    state, metrics = train_step(state, batch)
    return state.step, metrics

  return run, train_step.bytes_needed


def peak_flops(size: int = 4096) -> float:
  """FLOPs per second of a float32 matmul."""
  x = jnp.ones((size, size))
  matmul = jax.jit(lambda x: x @ x)
  seconds = report.interleaved_seconds({"": lambda: matmul(x)}, 5)[""]
  return 2 * size**3 / seconds


def measure_models() -> dict[str, dict[str, float]]:
  configs = {label: model_config(label) for label in MODELS}
  trainers = {label: trainer(config) for label, config in configs.items()}
  seconds = report.interleaved_seconds(
      {label: run for label, (run, _) in trainers.items()}, ROUNDS.value
  )
  peak, results = peak_flops(), {}
  for label, config in configs.items():
    tokens = config.batch_size * config.data.seq_len
    flops = 3 * tokens * sum(accounting.flops_per_token(config.model).values())
    results[label] = {
        "tokens_per_second": tokens / seconds[label],
        "step_seconds": seconds[label],
        "bytes": trainers[label][1],
        "flops_utilisation": flops / seconds[label] / peak,
        "parameters": sum(accounting.parameters(config.model).values()),
    }
  return results


def updater(side: int, dtype: str):
  """(a function that updates a table of side^2 rows, its temporary bytes)."""
  rows = side**2
  rng = np.random.default_rng(side)
  factors = row_update.Factors(
      jnp.asarray(rng.integers(0, rows, (TOKENS, READS)), jnp.int32),
      jnp.asarray(rng.integers(0, BLOCKS, (TOKENS, READS)), jnp.int32),
      jnp.asarray(rng.normal(size=(TOKENS, READS, CORES)), jnp.float32),
      jnp.asarray(rng.normal(size=(TOKENS, BLOCKS, WIDTH)), jnp.float32),
  )
  table = row_update.Table(
      *(jnp.zeros((rows, WIDTH), precision.DTYPES[dtype]) for _ in range(3))
  )

  def update(table, factors, step):
    adamw = row_update.AdamW(0.9, 0.95, 1e-8, 0.1, 1e-3, step)
    reads = row_order.sort_reads(factors.row_TK, rows)
    return row_update.update_rows(
        table, factors, reads, 1.0, adamw, step.astype(jnp.uint32)
    )

  compiled = (
      jax.jit(update, donate_argnums=0).lower(table, factors, jnp.int32(1))
      .compile()
  )
  count = 0

  def run():
    nonlocal table, count
    count += 1
    table = compiled(table, factors, jnp.int32(count))
    return table

  return run, compiled.memory_analysis().temp_size_in_bytes


def measure_updates(dtype: str) -> dict[int, dict[str, float]]:
  """Of tables of one dtype, by rows; all held at once."""
  updaters = {side: updater(side, dtype) for side in SIDES}
  seconds = report.interleaved_seconds(
      {side: run for side, (run, _) in updaters.items()}, ROUNDS.value
  )
  return {
      side**2: {"seconds": seconds[side], "temporary_bytes": temporaries}
      for side, (_, temporaries) in updaters.items()
  }


def plot(models, updates, path) -> None:
  figure, (left, right) = plt.subplots(
      1, 2, figsize=(9, 4), layout="constrained"
  )
  left.bar(models.keys(), [m["tokens_per_second"] for m in models.values()])
  left.set(ylabel="tokens per second", title="training step")
  for dtype, points in updates.items():
    right.plot(
        points.keys(), [1e3 * p["seconds"] for p in points.values()],
        marker="o", label=dtype,
    )
  right.set(
      xscale="log", xlabel="rows of the table", ylabel="ms",
      title=f"table update, {TOKENS} tokens", ylim=0,
  )
  right.legend()
  figure.savefig(path, dpi=150)


def main(_) -> None:
  updates = {dtype: measure_updates(dtype) for dtype in precision.DTYPES}
  models = measure_models()
  for label, result in models.items():
    print(
        f"{label:<10}{result['tokens_per_second']:10.0f} tokens/s "
        f"{result['bytes'] / 2**20:8.0f} MiB "
        f"{100 * result['flops_utilisation']:6.1f} % of the matmul's FLOPs"
    )
  for dtype, points in updates.items():
    for rows, point in points.items():
      print(
          f"update of {rows:>9,} rows, {dtype:<9}"
          f"{1e3 * point['seconds']:8.1f} ms, temporaries "
          f"{point['temporary_bytes'] / 2**20:.1f} MiB"
      )
    times = [point["seconds"] for point in points.values()]
    print(f"  {dtype}: largest over smallest {times[-1] / times[0]:.2f}")
  path = report.save("training", {
      "models": models, "updates": updates, "full": FULL.value,
  })
  plot(models, updates, path.with_suffix(".png"))


if __name__ == "__main__":
  app.run(main)
