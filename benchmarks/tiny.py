"""Does the memory pay? `tiny` against its dense twin, over several seeds.

  python -m benchmarks.tiny [--seeds=3] [--steps=400]

Both have the same FLOPs per token and take the same steps; the dense twin of
the first seed also trains for as many steps as take it the memory's time.
Writes results/tiny.json and results/tiny.png; about 8 minutes a seed on two
cores. Stopped, the same command goes on.
"""

import importlib
import json
import pathlib
import statistics
import subprocess
import sys

import matplotlib.pyplot as plt
from absl import app, flags

from benchmarks import report
from ultramem_jax import data
from ultramem_jax.settings import config as config_lib
from ultramem_jax.train.program import TrainProgram

MODELS = {"UltraMem": "tiny", "dense": "tiny_dense"}
ROOT = pathlib.Path(__file__).parent.parent

SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each model.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 400, "Steps of each run.", lower_bound=1)
WORKDIR = flags.DEFINE_string(
  "workdir", "runs/benchmark_tiny", "Directory of the runs."
)
EVALUATIONS = 2  # points of a curve; one takes about 20 s


def validation_curve(config: str, seed: int, steps: int) -> dict[int, float]:
  """Trains a config, or goes on; its validation bits per byte by step."""
  workdir = pathlib.Path(WORKDIR.value, f"{config}_{steps}_{seed}")
  curve = read_curve(workdir)
  if steps not in curve:
    subprocess.run(
      [
        sys.executable,
        "train.py",
        f"--config=configs/{config}.py",
        f"--workdir={workdir}",
        f"--config.seed={seed}",
        f"--config.steps={steps}",
        "--config.sample.num_tokens=0",
        f"--config.eval_every={max(1, steps // EVALUATIONS)}",
      ],
      cwd=ROOT,
      check=True,
      stdout=subprocess.DEVNULL,
    )
    curve = read_curve(workdir)
  return curve


def read_curve(workdir: pathlib.Path) -> dict[int, float]:
  """The validations that a run has in its log so far."""
  log = workdir / "metrics.jsonl"
  lines = log.read_text().splitlines() if log.exists() else []
  records = [json.loads(line) for line in lines]
  return {
    record["step"]: record["valid/bits_per_byte"]
    for record in records
    if "valid/bits_per_byte" in record
  }


def step_seconds(rounds: int = 20) -> dict[str, float]:
  """Median seconds of a training step of each model, interleaved."""

  def stepper(name):
    module = importlib.import_module(f"configs.{name}")
    config = config_lib.parse(module.get_config())
    batches = data.open(config).train(range(config.batch_size))
    batch = next(batches)
    batches.close()
    train_step = TrainProgram(config)
    state = train_step.init_state()

    def run():
      nonlocal state
      state, metrics = train_step(state, batch)
      return state, metrics

    return run

  return report.interleaved_seconds(
    {label: stepper(name) for label, name in MODELS.items()}, rounds
  )


def plot(curves, path) -> None:
  """Validation bits per byte against steps, one line a seed."""
  figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
  for (label, runs), color in zip(curves.items(), ("C0", "C7"), strict=True):
    for index, run in enumerate(runs):
      axes.plot(
        run.keys(),
        run.values(),
        color=color,
        marker=".",
        label=label if index == 0 else None,
      )
  axes.set(
    xlabel="step",
    ylabel="validation bits per byte",
    title="Python source, byte level, equal FLOPs per token",
  )
  axes.legend()
  axes.grid(alpha=0.3)
  figure.savefig(path, dpi=150)


def main(_) -> None:
  seconds = step_seconds()
  ratio = seconds["UltraMem"] / seconds["dense"]
  curves = {label: [] for label in MODELS}
  for seed in range(SEEDS.value):
    for label, name in MODELS.items():
      curves[label].append(validation_curve(name, seed, STEPS.value))
      print(f"seed {seed}, {label}: {curves[label][-1]}", flush=True)
  final = {
    label: [run[STEPS.value] for run in runs] for label, runs in curves.items()
  }
  gaps = [
    dense - memory
    for dense, memory in zip(final["dense"], final["UltraMem"], strict=True)
  ]
  longer = round(ratio * STEPS.value)
  equal_time = validation_curve(MODELS["dense"], 0, longer)[longer]
  for label in MODELS:
    print(
      f"{label:<10}{statistics.mean(final[label]):8.4f} bits per byte "
      f"{1e3 * seconds[label]:8.1f} ms per step"
    )
  print(f"gap {gaps} bits per byte, time {ratio:.2f}x")
  print(
    f"in the time of {STEPS.value} steps of UltraMem, seed 0, the dense twin "
    f"takes {longer} steps to {equal_time:.4f} bits per byte"
  )
  path = report.save(
    "tiny",
    {
      "steps": STEPS.value,
      "step_seconds": seconds,
      "time_ratio": ratio,
      "bits_per_byte": final,
      "gap": gaps,
      "curves": curves,
      "dense_at_equal_time": {"steps": longer, "bits_per_byte": equal_time},
    },
  )
  plot(curves, path.with_suffix(".png"))


if __name__ == "__main__":
  app.run(main)
