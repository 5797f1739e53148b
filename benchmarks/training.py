"""Training steps of models at equal FLOPs.

  python -m benchmarks.training [--full]

Tokens per second, bytes held by a device and model FLOPs utilisation (three
times the forward's, over what a large float32 matmul reaches here) of the 151M
dense, MoE, product-key and UltraMem models; shrunk unless --full, which wants
an accelerator. All in turn, about 2 minutes on two cores. Writes
results/training.json and results/training.png.
"""

import importlib

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from absl import app, flags

from benchmarks import report
from ultramem_jax.settings import config as config_lib
from ultramem_jax.tools import accounting
from ultramem_jax.train.program import TrainProgram

FULL = flags.DEFINE_bool("full", False, "The published sizes.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds.", lower_bound=1)

MODELS = {
  "dense": "151m_dense",
  "MoE": "151m_moe_2in32",
  "PKM": "151m_pkm_x10",
  "UltraMem": "151m_x12",
}
SHRUNK = {
  "model.embed_dim": 256,
  "model.num_layers": 6,
  "model.num_heads": 4,
  "model.dtype": "float32",
  "model.remat": "none",
  "model.dropout_rate": 0.0,
  "model.vocab_size": 264,
  "data.seq_len": 128,
  "batch_size": 4,
}
SHRUNK_PARTS = {
  "dense": {"model.mlp_dim": 1024},
  "MoE": {"model.moe.expert_dim": 512},
  "PKM": {
    "model.mlp_dim": 1024,
    "model.memory.spans": "3:3",
    "model.memory.num_keys": 200,
    "model.memory.key_dim": 64,
    "model.memory.value_dim": 256,
    "model.memory.top_m": 16,
  },
  "UltraMem": {
    "model.mlp_dim": 1024,
    "model.memory.spans": "2:3/4:5",
    "model.memory.num_keys": 200,
    "model.memory.key_dim": 64,
    "model.memory.value_dim": 128,
    "model.memory.top_m": 16,
  },
}


def model_config(label: str) -> config_lib.Config:
  c = importlib.import_module(f"configs.{MODELS[label]}").get_config()
  c.batch_size = 8
  if not FULL.value:
    c.update_from_flattened_dict({**SHRUNK, **SHRUNK_PARTS[label]})
  return config_lib.parse(c)


def trainer(config: config_lib.Config):
  """(a function that runs one step, bytes that the device holds)."""
  train_step = TrainProgram(config)
  state = train_step.init_state()
  rng = np.random.default_rng(0)
  shape = (config.batch_size, config.data.seq_len)
  tokens_BT = jnp.asarray(rng.integers(0, 256, shape), jnp.int32)
  batch = {
    "tokens": tokens_BT,
    "targets": tokens_BT,
    "weights": jnp.ones(shape),
    "segments": jnp.ones(shape, jnp.int32),
    "positions": jnp.zeros(shape, jnp.int32) + jnp.arange(shape[1]),
  }

  def run():
    nonlocal state
    state, metrics = train_step(state, batch)
    return state, metrics

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


def plot(models, path) -> None:
  figure, axes = plt.subplots(1, 3, figsize=(9, 3.5), layout="constrained")
  for panel, (title, name, scale) in zip(
    axes,
    (
      ("tokens per second", "tokens_per_second", 1),
      ("MiB held", "bytes", 2**-20),
      ("% of the matmul's FLOPs", "flops_utilisation", 100),
    ),
    strict=True,
  ):
    panel.bar(models.keys(), [scale * m[name] for m in models.values()])
    panel.set(title=title)
  figure.savefig(path, dpi=150)


def main(_) -> None:
  models = measure_models()
  for label, result in models.items():
    print(
      f"{label:<10}{result['tokens_per_second']:10.0f} tokens/s "
      f"{result['bytes'] / 2**20:8.0f} MiB "
      f"{100 * result['flops_utilisation']:6.1f} % of the matmul's FLOPs"
    )
  path = report.save("training", {"models": models, "full": FULL.value})
  plot(models, path.with_suffix(".png"))


if __name__ == "__main__":
  app.run(main)
