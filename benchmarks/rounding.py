"""Do tables in bfloat16, rounded at random, learn what float32 ones do?

  python -m benchmarks.rounding [--steps=200] [--seeds=1]

A shrunk `151m_x12_16gib` on the embedded corpus, its tables updated sparsely:
tables and moments in float32; both in bfloat16; and in bfloat16 with one
second moment for each row, as that config has it. All else is equal, the order
of the data included. Writes results/rounding.json and results/rounding.png;
about 3 minutes on two cores. If it was stopped, run the same command again to
continue.
"""

import pathlib
import statistics

from absl import flags
from matplotlib.figure import Figure

from benchmarks.harness import plots, report, runs

TARGET = 0.005  # of float32's loss, at most

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
COLORS = (plots.GREY, plots.BLUE, plots.ORANGE)

SEEDS = flags.DEFINE_integer(
  "seeds", 1, "Seeds of each variant.", lower_bound=1
)
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
  runs.train("tiny", workdir, overrides)
  return {
    "loss": runs.curve(workdir, "loss"),
    "valid": runs.curve(workdir, "valid/loss"),
  }


def measure() -> report.Result:
  curves = {label: [] for label in VARIANTS}
  for seed in range(SEEDS.value):
    for label in VARIANTS:
      curves[label].append(train(label, seed))
  final = {
    label: [run["valid"][STEPS.value] for run in seeds]
    for label, seeds in curves.items()
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
  return {
    "steps": STEPS.value,
    "validation_loss": final,
    "excess_over_float32": excess,
    "curves": curves,
  }


def plot(result: report.Result) -> Figure:
  """Draws the first seed's training loss, and its distance from float32's."""
  worst = max(result["excess_over_float32"].values())
  figure, (left, right) = plots.figure(
    f"Tables in bfloat16 add at most {100 * worst:.1f} % to the validation "
    "loss",
    result,
    panels=2,
    size=(5, 3.8),
  )
  exact = result["curves"]["float32"][0]["loss"]
  for (label, seeds), color in zip(
    result["curves"].items(), COLORS, strict=True
  ):
    loss = seeds[0]["loss"]
    steps = [int(step) for step in loss]
    valid = statistics.mean(result["validation_loss"][label])
    left.plot(steps, loss.values(), color=color, label=f"{label}: {valid:.3f}")
    excess = [100 * (value / exact[step] - 1) for step, value in loss.items()]
    right.plot(steps, excess, color=color)
  left.set(xlabel="training step", ylabel="training loss, nats a byte")
  left.legend(title="tables and moments: validation loss at the end")
  right.set(xlabel="training step", ylabel="training loss, % above float32's")
  return figure


if __name__ == "__main__":
  report.main("rounding", report.Part(measure, plot))
