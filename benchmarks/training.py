"""Training steps of the models that the paper compares.

  python -m benchmarks.training [--full]

Tokens per second, bytes held by a device and model FLOPs utilisation (three
times the forward's, over what a large float32 matmul reaches here) of the 151M
dense, MoE, product-key and UltraMem models on the embedded corpus; shrunk
unless --full, which needs an accelerator. All in turn, about 2 minutes on two
cores. Writes results/training.json and results/training.png.
"""

from absl import flags
from matplotlib.figure import Figure

from benchmarks.harness import configs, plots, report, timing, train_steps
from ultramem_jax.tools import accounting

FULL = flags.DEFINE_bool("full", False, "Measure the published sizes.")
ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds.", lower_bound=1)

MODELS = {
  "dense": "151m_dense",
  "MoE": "151m_moe_2in32",
  "PKM": "151m_pkm_x10",
  "UltraMem": "151m_x12",
}
CORPUS = {"batch_size": 8, "data.source": "stdlib", "data.tokenizer": "bytes"}
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
SHRUNK_MEMORY = {
  "model.mlp_dim": 1024,
  "model.memory.num_keys": 200,
  "model.memory.key_dim": 64,
  "model.memory.top_m": 16,
}
SHRUNK_PARTS = {
  "dense": {"model.mlp_dim": 1024},
  "MoE": {"model.moe.expert_dim": 512},
  "PKM": {
    **SHRUNK_MEMORY,
    "model.memory.spans": "3:3",
    "model.memory.value_dim": 256,
  },
  "UltraMem": {
    **SHRUNK_MEMORY,
    "model.memory.spans": "2:3/4:5",
    "model.memory.value_dim": 128,
  },
}


def measure() -> report.Result:
  loaded = {
    label: configs.load(
      name,
      CORPUS if FULL.value else {**CORPUS, **SHRUNK, **SHRUNK_PARTS[label]},
    )
    for label, name in MODELS.items()
  }
  steppers = {
    label: train_steps.stepper(config) for label, config in loaded.items()
  }
  seconds = timing.interleaved_seconds(
    {label: step for label, (step, _) in steppers.items()}, ROUNDS.value
  )
  peak, models = timing.matmul_flops_per_second(), {}
  for label, config in loaded.items():
    tokens = config.batch_size * config.data.seq_len
    flops = 3 * tokens * sum(accounting.flops_per_token(config.model).values())
    models[label] = {
      "tokens_per_second": tokens / seconds[label],
      "step_seconds": seconds[label],
      "bytes": steppers[label][1],
      "flops_utilisation": flops / seconds[label] / peak,
      "parameters": sum(accounting.parameters(config.model).values()),
    }
    print(
      f"{label:<10}{tokens / seconds[label]:10.0f} tokens/s "
      f"{models[label]['bytes'] / 2**20:8.0f} MiB "
      f"{100 * models[label]['flops_utilisation']:6.1f} % of the matmul's FLOPs"
    )
  return {"models": models, "full": FULL.value}


def plot(result: report.Result) -> Figure:
  """Draws speed, memory and utilisation, one panel each."""
  models = result["models"]
  dense = models["dense"]["tokens_per_second"]
  share = {k: 100 * m["tokens_per_second"] / dense for k, m in models.items()}
  size = "151M models" if result["full"] else "151M models, shrunk"
  work = {
    k: m["flops_utilisation"] / m["tokens_per_second"]
    for k, m in models.items()
  }
  told = [
    f"{label} at {share[label]:.0f} %, with "
    f"{work[label] / work['dense']:.2f} times its FLOPs"
    for label in ("UltraMem", "MoE")
  ]
  figure, panels = plots.figure(
    f"Of the dense model's speed, {told[0]}; {told[1]} ({size})",
    result,
    panels=3,
    size=(3.5, 2.8),
  )
  for panel, (title, name, scale, text) in zip(
    panels,
    (
      ("tokens a second", "tokens_per_second", 1, "{:,.0f}"),
      ("memory of the device, MiB", "bytes", 2**-20, "{:,.0f}"),
      ("FLOPs, % of a large matmul's", "flops_utilisation", 100, "{:.0f}"),
    ),
    strict=True,
  ):
    plots.bars(
      panel,
      {label: scale * m[name] for label, m in models.items()},
      text,
      [plots.MODELS[label] for label in models],
    )
    panel.set_xlabel(title)
  return figure


if __name__ == "__main__":
  report.main("training", report.Part(measure, plot))
