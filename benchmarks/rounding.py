"""Do tables in bfloat16, rounded at random, learn what float32 ones do?

  python -m benchmarks.rounding [--steps=200] [--seeds=1]

A shrunk `151m_x12_16gib` on the embedded corpus, its tables updated sparsely:
tables and moments in float32; both in bfloat16; and in bfloat16 with one
second moment for each row, as that config has it. All else is equal, the order
of the data included. Writes results/rounding.json and results/rounding.png;
about 3 minutes on two cores. Stopped, the same command goes on.
"""

import json
import pathlib
import statistics
import subprocess
import sys

import matplotlib.pyplot as plt
from absl import app, flags

from benchmarks import report

ROOT = pathlib.Path(__file__).parent.parent
TARGET = 0.005  # of float32's loss

SMALL = {
  "batch_size": 4,
  "data.seq_len": 128,
  "model.memory.num_keys": 256,
  "eval_batches": 128,
  "log_every": 5,
  "optim.table_update": "sparse",
  "sample.num_tokens": 0,
}
LOW = {
  "model.memory.storage.table_dtype": "bfloat16",
  "optim.table_moments": "bfloat16",
}
VARIANTS = {
  "float32": {},
  "bfloat16": LOW,
  "bfloat16, second moment by row": {**LOW, "optim.table_second_moment": "row"},
}

SEEDS = flags.DEFINE_integer("seeds", 1, "Seeds of each.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 200, "Steps of each run.", lower_bound=1)
WORKDIR = flags.DEFINE_string(
  "workdir", "runs/benchmark_rounding", "Directory of the runs."
)


def train(label: str, seed: int) -> dict[str, dict[int, float]]:
  """Trains a variant, or goes on with it.

  Returns:
    {"loss": by step, "valid": by step}, nats a token.
  """
  index = list(VARIANTS).index(label)
  workdir = pathlib.Path(WORKDIR.value, f"{STEPS.value}_{seed}_{index}")
  overrides = {
    **SMALL,
    **VARIANTS[label],
    "seed": seed,
    "steps": STEPS.value,
    "eval_every": STEPS.value,
  }
  subprocess.run(
    [
      sys.executable,
      "train.py",
      "--config=configs/tiny.py",
      f"--workdir={workdir}",
      *(f"--config.{name}={value}" for name, value in overrides.items()),
    ],
    cwd=ROOT,
    check=True,
    stdout=subprocess.DEVNULL,
  )
  records = [
    json.loads(line)
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]
  return {
    name: {r["step"]: r[key] for r in records if key in r}
    for name, key in (("loss", "loss"), ("valid", "valid/loss"))
  }


def plot(curves, path) -> None:
  """Training loss, and its difference from float32's, of the first seed."""
  figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 4), layout="constrained"
  )
  exact = curves["float32"][0]["loss"]
  for label, runs in curves.items():
    loss = runs[0]["loss"]
    left.plot(loss.keys(), loss.values(), label=label)
    right.plot(
      loss.keys(),
      [100 * (value / exact[step] - 1) for step, value in loss.items()],
    )
  left.set(xlabel="step", ylabel="training loss, nats a byte")
  right.set(xlabel="step", ylabel="% above float32")
  left.legend()
  for axes in (left, right):
    axes.grid(alpha=0.3)
  figure.savefig(path, dpi=150)


def main(_) -> None:
  curves = {label: [] for label in VARIANTS}
  for seed in range(SEEDS.value):
    for label in VARIANTS:
      curves[label].append(train(label, seed))
  final = {
    label: [run["valid"][STEPS.value] for run in runs]
    for label, runs in curves.items()
  }
  exact = statistics.mean(final["float32"])
  excess = {
    label: statistics.mean(losses) / exact - 1
    for label, losses in final.items()
  }
  for label, losses in final.items():
    print(
      f"{label:<32}validation loss {statistics.mean(losses):.4f} "
      f"({100 * excess[label]:+.2f} % of float32's; at most "
      f"{100 * TARGET} %)"
    )
  path = report.save(
    "rounding",
    {
      "steps": STEPS.value,
      "validation_loss": final,
      "excess_over_float32": excess,
      "curves": curves,
    },
  )
  plot(curves, path.with_suffix(".png"))


if __name__ == "__main__":
  app.run(main)
