"""What does the memory bring? `tiny` and three twins, over several seeds.

  python -m benchmarks.tiny [--seeds=3] [--steps=300]

UltraMem and a dense model, each with and without a convolution of five taps:
`tiny`'s memories convolve what they read, `tiny_dense_conv` what the MLPs of
the same two blocks read. All have the same FLOPs per token, to 1 %, the same
data in the same order and the same steps.

Training takes about 2 minutes a run on two cores, half an hour in all; if it
was stopped, run the same command again to continue. The losses do not depend
on what else the machine does. The times of a step do: they are measured first,
the four models in turn, and stand for the time of the curves. Curves are of the
beginning of the validation split, final losses of all of it. Writes
results/tiny.json and .png.
"""

import json
import pathlib
import statistics
from typing import NamedTuple

from absl import flags
from matplotlib.figure import Figure

from benchmarks.harness import configs, plots, report, runs, timing, train_steps

# Validations of a run, and their batches: the whole split has 230.
CURVE_POINTS, CURVE_BATCHES = 6, 16


class Twin(NamedTuple):
  """A model of the comparison.

  label, color: in plots.
  config: the NAME of configs/NAME.py.
  overrides: other values of the config's fields.
  """

  label: str
  color: str
  config: str
  overrides: dict[str, object]


TWINS = {
  "tiny": Twin("UltraMem", plots.BLUE, "tiny", {}),
  "tiny_dense_conv": Twin(
    "dense, with the convolution", plots.ORANGE, "tiny_dense_conv", {}
  ),
  "tiny_no_conv": Twin(
    "UltraMem, without the convolution",
    plots.GREEN,
    "tiny",
    {"model.memory.query_conv": 0},
  ),
  "tiny_dense": Twin("dense", plots.GREY, "tiny_dense", {}),
}

SEEDS = flags.DEFINE_integer("seeds", 3, "Seeds of each model.", lower_bound=1)
STEPS = flags.DEFINE_integer("steps", 300, "Steps of each run.", lower_bound=1)
WORKDIR = flags.DEFINE_string(
  "workdir", "runs/benchmark_tiny", "Directory of the runs."
)


def train(name: str, seed: int) -> tuple[dict[int, float], float]:
  """Trains a twin, or goes on.

  Returns:
    (curve, final): bits per byte by step, at the beginning of the validation
    split; and on the whole split, after the last step.
  """
  twin, steps = TWINS[name], STEPS.value
  workdir = pathlib.Path(WORKDIR.value, f"{name}_{steps}_{seed}")
  if steps not in runs.curve(workdir, "valid/bits_per_byte"):
    overrides = {
      **twin.overrides,
      "seed": seed,
      "steps": steps,
      "sample.num_tokens": 0,
      "eval_every": max(1, steps // CURVE_POINTS),
      "eval_batches": CURVE_BATCHES,
    }
    runs.train(twin.config, workdir, overrides)
  curve = runs.curve(workdir, "valid/bits_per_byte")
  whole_split = workdir / "whole_split.json"
  if not whole_split.exists():
    whole_split.write_text(json.dumps(runs.evaluate(workdir)))
  final = json.loads(whole_split.read_text())["bits_per_byte"]
  print(f"{name}, seed {seed}: {final:.3f}; {curve}", flush=True)
  return curve, final


def measure() -> report.Result:
  steppers = {
    name: train_steps.stepper(configs.load(twin.config, twin.overrides))[0]
    for name, twin in TWINS.items()
  }
  seconds = timing.interleaved_seconds(steppers, rounds=20)
  del steppers
  curves, final = {name: [] for name in TWINS}, {name: [] for name in TWINS}
  for seed in range(SEEDS.value):
    for name in TWINS:
      curve, bits_per_byte = train(name, seed)
      curves[name].append(curve)
      final[name].append(bits_per_byte)
  for name, values in final.items():
    print(
      f"{TWINS[name].label:<34}{statistics.mean(values):7.3f} bits per byte "
      f"({min(values):.3f} to {max(values):.3f}), "
      f"{1e3 * seconds[name]:.0f} ms a step"
    )
  return {
    "steps": STEPS.value,
    "step_seconds": seconds,
    "bits_per_byte": final,
    "curves": curves,
  }


def plot(result: report.Result) -> Figure:
  """Draws bits per byte against steps and against time, a line for a seed."""
  final = result["bits_per_byte"]
  mean = {name: statistics.mean(values) for name, values in final.items()}
  num_seeds = len(final["tiny"])
  figure, (over_steps, over_time) = plots.figure(
    "At equal FLOPs, the memory gains "
    f"{mean['tiny_dense_conv'] - mean['tiny']:.2f} bits per byte beside the "
    "convolution, "
    f"{mean['tiny_dense'] - mean['tiny_no_conv']:.2f} without it",
    result,
    panels=2,
    sharey=True,
  )
  for name, twin in TWINS.items():
    for seed, curve in enumerate(result["curves"][name]):
      steps = [int(step) for step in curve]
      style = {"color": twin.color, "marker": ".", "lw": 1.2}
      over_steps.plot(
        steps,
        curve.values(),
        label=f"{twin.label}: {mean[name]:.3f}" if seed == 0 else None,
        **style,
      )
      seconds = result["step_seconds"][name]
      over_time.plot([seconds * s for s in steps], curve.values(), **style)
  over_steps.set(
    xlabel="training step of 2048 bytes of Python source",
    ylabel="validation loss, bits per byte",
  )
  over_time.set(xlabel="seconds of training")
  over_steps.legend(
    title=f"mean of {num_seeds} seeds after {result['steps']} steps"
  )
  return figure


if __name__ == "__main__":
  report.main("tiny", report.Part(measure, plot))
